"""The state of the caches: what their identity is, which shards they should hold, which of them are finished."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from models.hand_model import OPEN_HAND, OPEN_HAND_FILE
from models.model_config import model_config_path
from pipeline.calibrations import is_calibrated, with_codec
from pipeline.config import Role
from pipeline.experiment import Experiment
from pipeline.manifests import Manifest, ManifestIndex, manifests_of, tables_of
from pipeline.references import own_reference
from stages.calibrate import check_channels
from stages.preparation import TeachSettings
from stages.teach import teach_identity
from storage.cache import CacheFolder, fingerprint
from storage.errors import DamageError, InputError
from storage.ledger import ShardRecord
from storage.manifest import ShardPlan, read_manifest, shards_of
from storage.safe_yaml import read_yaml
from storage.snapshots import build_snapshot, read_head, snapshot_digest
from storage.verification import damaged_shards, verify_shard

NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
"""A folder for each GPU that the driver knows; read because importing torch to ask takes seconds."""


@dataclass(frozen=True, eq=False)
class DatasetShards:
    """One data set as its manifests describe it."""

    name: str
    table: pa.Table
    """All its rows (PLAN_COLUMNS), those of every scanned source; quarantined ones too."""
    plans: tuple[ShardPlan, ...]
    unscanned: int
    """Source files whose manifest is not known yet."""
    manifests: tuple[Path, ...] = ()
    first_rows: tuple[int, ...] = ()
    """Where each manifest's rows begin in `table`."""

    def whole_rows(self, plans: Iterable[ShardPlan]) -> Iterator[tuple[ShardPlan, pa.Table]]:
        """Each shard with all columns of its rows; of the manifests one at a time is in memory."""
        for place, group in groupby(plans, key=lambda plan: bisect_right(self.first_rows, plan.rows[0]) - 1):
            whole = read_manifest(self.manifests[place])
            for plan in group:
                yield plan, whole.take(plan.rows - self.first_rows[place])


@dataclass(frozen=True)
class CacheState:
    """One role's cache: what it should hold and what it holds."""

    role: Role
    identity: Mapping[str, Any]
    settings: TeachSettings
    folder: CacheFolder
    datasets: Mapping[str, DatasetShards]
    records: Mapping[str, ShardRecord]
    damaged: frozenset[str]
    """Input hashes of finished shards whose files are not there, or not of the size they should have."""
    address: Path | str
    """Where readers on any machine find it: its folder, or its URL."""
    stored: frozenset[str] = frozenset()
    """Of a workdir on a store: input hashes of shards of which it holds anything, recorded or not."""
    published: Mapping[str, str] | None = None
    """The snapshots that this pipeline file referred to last; None: it did not run with this cache yet."""

    @property
    def root(self) -> Path:
        return self.folder.root

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.identity)

    @property
    def calibrated(self) -> bool:
        """Whether the cache's encoding is known in full; before, nothing can be in it."""
        return is_calibrated(self.identity)

    def sound(self, input_hash: str) -> bool:
        """Whether a shard is finished and undamaged."""
        return input_hash in self.records and input_hash not in self.damaged

    def todo(self, name: str) -> list[ShardPlan]:
        """The shards of a data set that have to be computed."""
        return [plan for plan in self.datasets[name].plans if not self.sound(plan.input_hash)]

    def complete(self, name: str) -> bool:
        """Whether everything of a data set is cached."""
        return not self.datasets[name].unscanned and not self.todo(name)

    @cached_property
    def digests(self) -> dict[str, str | None]:
        """The snapshot each data set should have; None where that is not known before the teacher has run.

        A damaged shard is known by its record: repaired, it will be what it was.
        """
        return {name: self._digest(name) if self._foreseen(name) else None for name in self.datasets}

    def _foreseen(self, name: str) -> bool:
        shards = self.datasets[name]
        return not shards.unscanned and all(plan.input_hash in self.records for plan in shards.plans)

    def snapshot(self, name: str) -> pa.Table:
        """The snapshot of a complete data set."""
        shards = self.datasets[name]
        return build_snapshot(shards.table, shards.plans, self.records)

    def _digest(self, name: str) -> str:
        return snapshot_digest(self.fingerprint, self.snapshot(name))

    def counts(self, name: str) -> tuple[int, int]:
        """(samples, those of them that are quarantined) of a complete data set."""
        shards = self.datasets[name]
        left_out = sum(len(self.records[plan.input_hash].quarantined) for plan in shards.plans)
        if len(shards.table):
            left_out += len(shards.table) - shards.table["reason"].null_count
        return len(shards.table), left_out

    @property
    def head(self) -> dict[str, str]:
        """The snapshots that the cache points at now; where several pipeline files use it, the last change of any."""
        try:
            return read_head(self.root)
        except DamageError:
            return {}  # it is written again at the end of the next run


def current_snapshots(state: CacheState) -> Mapping[str, str]:
    """The snapshots that were current when this pipeline file ran last, or that are, if it never did."""
    return state.head if state.published is None else state.published


def resolved_precision(experiment: Experiment) -> Literal["fp32", "bf16"]:
    """auto: bf16 where the teacher gets a GPU, fp32 where it runs on a CPU."""
    teacher = experiment.config.teacher
    if teacher.precision != "auto":
        return teacher.precision
    return "bf16" if teacher_gpus(experiment) > 0 else "fp32"


def teacher_gpus(experiment: Experiment) -> float:
    """GPUs that one teacher takes; auto: one where there is one."""
    asked = experiment.config.teacher.workers.gpus
    if asked != "auto":
        return asked
    if experiment.config.cluster.address == "local":
        return 1.0 if NVIDIA_GPUS.is_dir() and any(NVIDIA_GPUS.iterdir()) else 0.0
    from pipeline.workers import cluster_size, ray_session

    with ray_session(experiment.config.cluster):
        return 1.0 if cluster_size()[0].get("GPU", 0) >= 1 else 0.0


def cache_identity(experiment: Experiment, role: Role) -> dict[str, Any]:
    """What decides the answers that a role's cache holds."""
    teacher = experiment.config.teacher
    checkpoint = experiment.path(teacher.checkpoint)
    checkpoint_sha256 = experiment.digests.sha256(checkpoint)
    hand = hand_model_source(experiment)
    identity = teach_identity(
        settings=_settings(experiment, role),
        checkpoint_sha256=checkpoint_sha256,
        model_config=_model_config(model_config_path(checkpoint)),
        hand_model_sha256=checkpoint_sha256 if hand is None else experiment.digests.sha256(hand),
        precision=resolved_precision(experiment),
        strict_numerics=_strict_numerics(experiment),
    )
    check_channels(experiment.config.cache.features.encoding, feature_channels(identity))
    return with_codec(experiment, identity)


def feature_channels(identity: Mapping[str, Any]) -> int:
    """C of the teacher's features: the width of its backbone; ViT-H's where it is not said."""
    return int(identity["teacher"]["model_config"]["MODEL"]["BACKBONE"].get("EMBED_DIM", 1280))


def hand_model_source(experiment: Experiment) -> Path | None:
    """The hand model's file; None: the checkpoint's own."""
    name = experiment.config.teacher.mano_model
    if name is None:
        return None
    return OPEN_HAND_FILE if name == OPEN_HAND else experiment.path(name)


def _settings(experiment: Experiment, role: Role) -> TeachSettings:
    config = experiment.config
    return TeachSettings.of(role, config.cache, config.teacher.batch_size, config.seed)


def _model_config(path: Path) -> dict[str, Any]:
    """The parts of model_config.yaml that shape the network; the rest may change without a new cache."""
    try:
        document = read_yaml(path)
        model = {key: value for key, value in document["MODEL"].items() if key != "BACKBONE"}
        backbone = {key: value for key, value in document["MODEL"]["BACKBONE"].items() if key != "PRETRAINED_WEIGHTS"}
        return {"MODEL": model | {"BACKBONE": backbone}, "FOCAL_LENGTH": document["EXTRA"]["FOCAL_LENGTH"]}
    except OSError as error:
        raise InputError(f"teacher.checkpoint: cannot read {path}: {error.strerror}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: want HaMeR's model_config.yaml with MODEL.BACKBONE and EXTRA.FOCAL_LENGTH; {error!r}"
        ) from None


def stored_state(experiment: Experiment, role: Role) -> CacheState:
    """What a role's cache holds, without a look at the data sets: their sources may be gone."""
    identity = cache_identity(experiment, role)
    folder = CacheFolder(experiment.caches_folder / fingerprint(identity))
    records = folder.finished() if folder.ledger_dir.is_dir() else {}
    address, store = experiment.workdir.address(folder.root), experiment.workdir.store
    stored = frozenset() if store is None else store.shards(folder.fingerprint)
    return CacheState(role, identity, _settings(experiment, role), folder, {}, records, frozenset(), address, stored)


def cache_state(experiment: Experiment, role: Role) -> CacheState:
    """Compare what a role's cache should hold with its ledger.

    Once a process: the plans of all stages ask for it. Whoever changes a cache or a manifest calls `forget_caches`.
    """
    if role not in experiment.caches:
        experiment.caches[role] = _read_state(experiment, role)
    return experiment.caches[role]


def forget_caches(experiment: Experiment) -> None:
    """Have the caches looked at again: they have changed, or another process may have changed them."""
    experiment.caches.clear()


def _read_state(experiment: Experiment, role: Role) -> CacheState:
    index = ManifestIndex(experiment)
    stored = stored_state(experiment, role)
    folder, records = stored.folder, stored.records
    names = experiment.config.datasets_of(role)
    with ThreadPoolExecutor(1, thread_name_prefix="look") as pool:  # it waits for the disk while manifests are read
        ours = [record for record in records.values() if record.dataset in names]
        looking = pool.submit(_damaged, experiment, folder, ours)
        datasets = {name: _dataset_shards(experiment, role, name, index) for name in names}
        looked_damaged = looking.result()
    plans = [plan.input_hash for shards in datasets.values() for plan in shards.plans]
    wanted = [records[item] for item in plans if item in records]
    damaged = looked_damaged & frozenset(plans) | _changed(experiment, folder, wanted, looked_damaged)
    before = own_reference(experiment)
    published = None if before is None else before.snapshots.get(folder.fingerprint)
    return replace(stored, datasets=datasets, damaged=damaged, published=published)


def _damaged(experiment: Experiment, folder: CacheFolder, records: list[ShardRecord]) -> frozenset[str]:
    """Of a workdir on a store, those of which it has nothing: objects are not cut short, and `verify` reads them."""
    if experiment.workdir.store is None:
        return damaged_shards(folder, records)
    return frozenset(record.input_hash for record in records) - experiment.workdir.store.shards(folder.fingerprint)


def _changed(
    experiment: Experiment, folder: CacheFolder, records: list[ShardRecord], damaged: frozenset[str]
) -> frozenset[str]:
    """Beyond names and sizes: when asked to hash everything again, what differs by any byte, once a process."""
    changed = set()
    for record in records if experiment.rehash and experiment.workdir.store is None else ():
        key = f"{folder.fingerprint}/{record.input_hash}"
        if key in experiment.reread or record.input_hash in damaged:
            continue
        if verify_shard(folder, record):
            changed.add(record.input_hash)
        else:
            experiment.reread.add(key)
    return frozenset(changed)


def _strict_numerics(experiment: Experiment) -> Mapping[str, Any] | None:
    if not experiment.config.cache.strict_numerics:
        return None
    import torch

    return {"device": "cuda" if teacher_gpus(experiment) else "cpu", "torch": torch.__version__}


def _dataset_shards(experiment: Experiment, role: Role, name: str, index: ManifestIndex) -> DatasetShards:
    found = [manifest for _, manifest in manifests_of(experiment, name, experiment.datasets[name], index)]
    manifests = tuple(manifest for manifest in found if manifest is not None)
    unscanned = len(found) - len(manifests)
    return _cut_into_shards(name, role, experiment.config.cache.samples_per_shard, manifests, unscanned)


@lru_cache(maxsize=64)
def _cut_into_shards(
    name: str, role: Role, samples_per_shard: int, manifests: tuple[Manifest, ...], unscanned: int
) -> DatasetShards:
    """Remembered, because the plan of every stage asks; the manifests are told apart as objects, not by value."""
    if not manifests:
        return DatasetShards(name, pa.table({}), (), unscanned)
    tables = tables_of(manifests)
    table = pa.concat_tables(tables)
    plans = shards_of(table, role, samples_per_shard)
    first_rows = accumulate((len(table) for table in tables[:-1]), initial=0)
    paths = tuple(manifest.path for manifest in manifests)
    return DatasetShards(name, table, tuple(plans), unscanned, paths, tuple(first_rows))
