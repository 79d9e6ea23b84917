"""Inputs that a configuration names by s3:// URLs: looked up there, and the configuration with their copies' paths.

From there on nobody sees a difference: a digest is of the bytes, wherever they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from models.model_config import model_config_places
from pipeline.config import PipelineConfig
from stages.ingest import expand_braces
from storage.errors import InputError
from storage.inputs import bring_all, copy_of, is_file, look
from storage.objects import is_url, parsed_url

SECTIONS = ("datasets", "teacher", "train", "students")
"""Those that name input files."""


def with_copies(config: PipelineConfig) -> PipelineConfig:
    """The configuration with the copies' paths in the place of URLs.

    What the store has now is known then. Data sets and the teacher's checkpoint are copied when they are opened, by the
    machine that opens them: the command's own may need none of it. The rest, which is small, is here.

    Raises:
        InputError: something is not on the store, or cannot be a URL.
        WorkError: the store does not answer.
    """
    document = config.model_dump(exclude_unset=True)
    urls = {section: [e for url in _urls(document.get(section)) for e in expand_braces(url)] for section in SECTIONS}
    if not any(urls.values()):
        return config
    _check_synthesised(config)
    beside = _beside(config.teacher.checkpoint)
    look(sorted({url for named in urls.values() for url in named}), optional=beside)
    needed = {url for section in SECTIONS if section != "datasets" for url in urls[section]}
    bring_all(map(copy_of, needed - {config.teacher.checkpoint}))
    bring_all(path for path in map(copy_of, beside) if is_file(path))
    return PipelineConfig.model_validate(
        {name: _local(value) if name in SECTIONS else value for name, value in document.items()}
    )


def _urls(value: Any) -> Iterator[str]:
    if isinstance(value, str) and is_url(value):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _urls(each)


def _local(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _local(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_local(each) for each in value]
    return str(copy_of(value)) if isinstance(value, str) and is_url(value) else value


def _beside(checkpoint: str) -> list[str]:
    """Where a checkpoint's model_config.yaml may be."""
    if not is_url(checkpoint):
        return []
    scheme, bucket, key = parsed_url(checkpoint)
    return [f"{scheme}://{bucket}{place}" for place in model_config_places(PurePosixPath("/", key))]


def _check_synthesised(config: PipelineConfig) -> None:
    for name in config.synthesise.sets if config.synthesise is not None else ():
        if any(_urls(config.datasets[name].model_dump())):
            raise InputError(f"datasets.{name}: it is synthesised, which writes to a folder; give a path, not a URL")
