"""The records of what each pipeline file refers to, so that `clean` of one never takes from another.

Two files may share a workdir, and workdirs may share a folder of caches (`cache.root`). Each file keeps one record in
`references/` of its workdir and of its caches' folder: `<digest of the file's and the workdir's path>.json`, sealed.
`pipeline.referring` writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.digests import digest_of
from pipeline.experiment import Experiment
from storage.durable import read_sealed_json
from storage.errors import DamageError


@dataclass(frozen=True)
class Reference:
    """One pipeline file's record. Lists are sorted, so that the same references are the same bytes."""

    config: str
    workdir: str
    sources: list[str]
    """`<data set>|<path>` of every source file."""
    outputs: list[str]
    """Manifests, students and evaluations, relative to the workdir."""
    calibrations: list[str]
    """Keys of the calibrations that fitted the caches' encodings."""
    shards: dict[str, list[str]]
    """Fingerprint of each cache -> input hashes."""
    snapshots: dict[str, dict[str, str]]
    """Fingerprint of each cache -> data set -> digest, of those that are complete."""

    @property
    def gone(self) -> bool:
        """Whether the file is not there any more. Its record holds all the same: a disk may be away for a while."""
        return not Path(self.config).is_file()


def reference_name(experiment: Experiment) -> str:
    """The file name of this pipeline file's record."""
    return f"{digest_of([str(experiment.file), experiment.workdir.place])[:16]}.json"


def own_reference(experiment: Experiment) -> Reference | None:
    """What this pipeline file referred to at its last run; None: it never ran here, or the record is damaged."""
    try:
        return _read(experiment.cache_references / reference_name(experiment))
    except (FileNotFoundError, NotADirectoryError, DamageError):
        return None  # the next run writes it again


def others(experiment: Experiment, folder: Path) -> dict[Path, Reference]:
    """What other pipeline files refer to, by the records in a workdir's or a caches' `references/`.

    A record that came here with a copied workdir is left out, where the workdir that it names has it too.

    Raises:
        DamageError: a record is damaged, so what it protects is not known.
    """
    found = {path: _read(path) for path in sorted(folder.glob("*.json")) if path.name != reference_name(experiment)}
    return {path: reference for path, reference in found.items() if not _copied(experiment, path, reference)}


def _copied(experiment: Experiment, path: Path, reference: Reference) -> bool:
    if path.parent != experiment.workdir.references or reference.workdir == experiment.workdir.place:
        return False
    return (Path(reference.workdir) / "references" / path.name).is_file()


def _read(path: Path) -> Reference:
    document: Mapping[str, Any] = read_sealed_json(path)
    return Reference(**document)
