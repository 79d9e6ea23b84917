"""The names of backbones, timm's read off its source. Light to import: to ask timm itself takes seconds."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

from models.sizes import HAMER

PREFIX = "torchvision/"
"""`torchvision/resnet50` is the backbone's name in a student's specification."""
PLUGINS = "handstill.backbones"
"""The group of entry points that brings backbones of other packages."""
_REGISTERED = re.compile(r"@register_model\s*\ndef (\w+)\(")


@lru_cache
def timm_names() -> frozenset[str]:
    """All models that timm registers; none where it is not installed. 0.1 s."""
    spec = find_spec("timm")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    sources = [path for folder in folders for path in Path(folder, "models").rglob("*.py")]
    return frozenset(name for path in sources for name in _REGISTERED.findall(path.read_text(encoding="utf-8")))


def plugin(backbone: str) -> EntryPoint | None:
    """The installed package that brings a backbone of that name: an entry point of `PLUGINS` whose module registers it
    with timm. What is installed is trusted; a configuration names no code."""
    return next(iter(entry_points(group=PLUGINS, name=backbone)), None)


def may_be_known(backbone: str) -> bool:
    """Whether it is HaMeR's own, claims to be torchvision's, is timm's, with or without the tag of its weights
    (mobilenetv3_large_100.ra_in1k), or comes with an installed package."""
    ours = backbone == HAMER or backbone.startswith(PREFIX)
    return ours or backbone.partition(".")[0] in timm_names() or plugin(backbone) is not None
