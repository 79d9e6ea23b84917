"""Makes processes ill: with this folder on PYTHONPATH every interpreter that starts looks for SICKNESS.

SICKNESS is JSON, a list of:
    {"at": "decode", "sample": sha256 of the encoded photograph, "how": ...}   in whoever decodes it
    {"at": "store",  "sample": sample id, "how": ...}                          in the teacher that stores it
    {"at": "memory", "bytes": n}          a teacher may take so much more memory than before its first forward pass
how: "die" (SIGKILL), "hang", "slow" (by "seconds": one).
"once": a file that is made by the first that catches it, which cures the others. "sample": "any" is every one.

Python imports a `sitecustomize` by itself; the modules are wrapped when they are imported, and not before.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.util
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

Sickness = dict[str, Any]


def _strike(sickness: Sickness) -> None:
    if "once" in sickness:
        try:
            Path(sickness["once"]).touch(exist_ok=False)
        except FileExistsError:
            return
    if sickness["how"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(sickness.get("seconds", 1.0) if sickness["how"] == "slow" else 10_000.0)


def _in_decode(module: ModuleType, sickness: Sickness) -> None:
    healthy = module.decode

    def decode(data: bytes) -> Any:
        if sickness["sample"] in ("any", hashlib.sha256(data).hexdigest()):
            _strike(sickness)
        return healthy(data)

    module.decode = decode  # type: ignore[attr-defined]


def _in_store(module: ModuleType, sickness: Sickness) -> None:
    healthy = module.ShardWriter.append

    def append(self: Any, sample_id: str, *rest: Any) -> None:
        if sickness["sample"] in ("any", sample_id):
            _strike(sickness)
        healthy(self, sample_id, *rest)

    module.ShardWriter.append = append


def _in_memory(module: ModuleType, sickness: Sickness) -> None:
    healthy = module.run_padded

    def run_padded(*arguments: Any) -> Any:
        if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + sickness["bytes"], resource.RLIM_INFINITY))
        return healthy(*arguments)

    module.run_padded = run_padded  # type: ignore[attr-defined]


PLACES: dict[str, tuple[str, Callable[[ModuleType, Sickness], None]]] = {
    "decode": ("stages.pictures", _in_decode),
    "store": ("storage.shards", _in_store),
    "memory": ("stages.answers", _in_memory),
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules to be wrapped, each once."""

    def __init__(self, sicknesses: list[Sickness]) -> None:
        self._waiting = [(*PLACES[sickness["at"]], sickness) for sickness in sicknesses]

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        mine = [(wrap, sickness) for module, wrap, sickness in self._waiting if module == name]
        if not mine:
            return None
        self._waiting = [waiting for waiting in self._waiting if waiting[0] != name]
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for wrap, sickness in mine:
                wrap(module, sickness)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "SICKNESS" in os.environ:
    sys.meta_path.insert(0, _Finder(json.loads(os.environ["SICKNESS"])))
