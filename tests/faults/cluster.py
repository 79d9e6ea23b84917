"""A Ray cluster of several raylets on this machine, as `ray start` makes it; nodes can be killed and added."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from tests.faults.driver import PATIENCE_S, alive, send

LOOPBACK = "127.0.0.1"
JOINED = "Ray runtime started."
"""What `ray start` says when the node is part of its cluster."""
TOKEN = "t0ken-for-tests-" + "y" * 32


@dataclass
class Node:
    """One `ray start --block` and all that it started."""

    process: subprocess.Popen[bytes]
    _known: set[int] = field(default_factory=set)
    """All that were seen, also those whose parent is gone by now."""

    def pids(self) -> list[int]:
        """Every process of the node, Ray's own and the workers; the one that `ray start` is comes first."""
        found = [self.process.pid, *below(self.process.pid)]
        self._known.update(found)
        return found

    def own(self, program: str) -> int:
        """The process of that program, e.g. raylet or gcs_server."""
        (found,) = [pid for pid in self.pids() if Path(arguments_of(pid)[0]).name == program]
        return found

    def kill(self, program: str) -> None:
        """SIGKILL one process of the node; what is left of the node ends by itself, sooner or later."""
        send(self.own(program), signal.SIGKILL)
        self.process.wait(PATIENCE_S)

    def lose(self) -> None:
        """SIGKILL everything at once, as when the machine is gone; also what is left of a node that was killed."""
        for pid in self.pids():
            send(pid, signal.SIGSTOP)  # none may see another one die
        self.pids()
        mine = [
            pid for pid in self._known if any("ray" in word for word in arguments_of(pid))
        ]  # numbers are used again
        for pid in mine:
            send(pid, signal.SIGKILL)
        self.process.wait(PATIENCE_S)
        _wait_for_the_end(mine)

    def workers(self, title: str) -> list[int]:
        """Ray's workers on this node whose title has `title` in it."""
        return [pid for pid in self.pids() if title in " ".join(arguments_of(pid)[:1]) and alive(pid)]


@dataclass
class RayNodes:
    """A head without CPUs of its own, and as many nodes as are added. A context manager that leaves nothing behind."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="hs-ray-")))  # sockets want short paths
    nodes: list[Node] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=count)
    head: Node = field(init=False)
    address: str = field(init=False)

    def __enter__(self) -> RayNodes:
        self.start_head()
        return self

    def __exit__(self, *_: object) -> None:
        for node in [*self.nodes, self.head]:
            node.lose()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """What a driver needs to find the cluster by `cluster.address: auto`."""
        return {
            "RAY_ADDRESS": self.address,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
        }

    def start_head(self) -> None:
        """Make the head, on another port than the last one had."""
        port = free_port()
        self.address = f"{LOOPBACK}:{port}"
        self.head = self._start(
            "--head", f"--port={port}", "--num-cpus=0", f"--temp-dir={self.folder}", "--include-dashboard=false"
        )

    def add(self, cpus: int = 2, resources: str = "{}") -> Node:
        """Start a node and wait until it has joined."""
        node = self._start(f"--address={self.address}", f"--num-cpus={cpus}", f"--resources={resources}")
        self.nodes.append(node)
        return node

    def forget(self, node: Node) -> None:
        """Take a node that is gone off the list."""
        self.nodes.remove(node)

    def _start(self, *arguments: str) -> Node:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
        log = self.folder / f"node-{next(self._numbers)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    *(str(Path(sys.executable).with_name("ray")), "start", "--block", f"--node-ip-address={LOOPBACK}"),
                    *("--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"),
                    *("--object-store-memory=150000000", *arguments),
                ],
                env=environment | self.environment | {"OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE_S
        while JOINED not in (said := log.read_text()):
            assert process.poll() is None, said
            assert time.monotonic() < deadline, f"the node took too long:\n{said}"
            time.sleep(0.05)
        return Node(process)


def free_port() -> int:
    with socket.socket() as one:
        one.bind((LOOPBACK, 0))
        return int(one.getsockname()[1])


def arguments_of(pid: int) -> list[str]:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return [""]


def below(pid: int) -> list[int]:
    """Children, their children and so on."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def _wait_for_the_end(pids: list[int]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
