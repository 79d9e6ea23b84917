"""A teacher actor on Ray: one model load, one shard after the other, its pictures decoded ahead on other cores.

An actor starts the decoding of its shard as a streaming task on another core, and that of its next shard too, so that
it never waits between shards. Backpressure bounds what is decoded ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from models.model_config import model_config_places
from pipeline.events import append_event, told
from pipeline.job_code import check_job_code
from pipeline.workdir import Claim
from pipeline.workers import at_work, get, is_death
from stages.answers import Forward
from stages.preparation import PreparedBatch, ShardJob, prepared_batches
from storage.encodings import PICTURE_SIZE_PX
from storage.errors import WorkError
from storage.inputs import bring

Work = Callable[[ShardJob, Iterable[PreparedBatch], Forward, Mapping[str, Any]], Any]
"""What a teacher does with a job: (job, its batches, forward pass, provenance) -> result. `teach_shard` is one."""

BATCHES_AHEAD = 3
"""Decoded batches that wait for an actor, a shard: enough to hide a slow picture, little memory (12.6 MB at 64)."""


class DecodingDiedError(WorkError):
    """Whatever decodes a shard dies, however often it is begun again; the teacher itself lives."""


@dataclass(frozen=True)
class TeacherSettings:
    """What an actor needs to load the teacher; picklable."""

    checkpoint: Path
    mano_model: str | None
    precision: Literal["fp32", "bf16"]
    gpus: float
    events: Path
    claim: Claim
    decode_retries: int
    """How often a shard's decoding is begun again because its process died."""
    compiled: bool = False
    threads: int | None = None
    """CPU threads of the forward pass; None: torch's own choice."""
    load: Callable[[TeacherSettings], tuple[Forward, dict[str, Any]]] | None = None
    """What gives forward pass and provenance; None: `load_from_checkpoint`."""


def load_from_checkpoint(settings: TeacherSettings) -> tuple[Forward, dict[str, Any]]:
    """Forward pass and provenance of the teacher that the settings name."""
    import torch

    from models.teacher import load_teacher
    from stages.teach import numerics, teacher_forward

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = "cuda" if settings.gpus else "cpu"
    append_event(settings.events, "teacher_loading", device=device)
    for place in (settings.checkpoint, *model_config_places(settings.checkpoint)):
        bring(place, optional=True, fresh=True)
    bring(None if settings.mano_model is None else Path(settings.mano_model))
    teacher = load_teacher(
        settings.checkpoint, settings.mano_model, device, settings.precision, compiled=settings.compiled
    )
    return teacher_forward(teacher, device), numerics(device, compiled=settings.compiled)


class TeacherActor:
    """Holds a loaded teacher and its run's claim on the workdir, for life (wrapped by `ray.remote`)."""

    def __init__(self, settings: TeacherSettings) -> None:
        self._settings = settings
        self._events = settings.events
        self._started: dict[str, Any] = {}
        self._holding = ExitStack()

    @cached_property
    def _teacher(self) -> tuple[Forward, dict[str, Any]]:
        """Forward pass and provenance. Loaded for the first shard: an error there has its type, one above has none."""
        settings = self._settings
        self._holding.enter_context(settings.claim.held())
        loaded = (settings.load or load_from_checkpoint)(settings)
        append_event(settings.events, "teacher_ready")
        return loaded

    def ready(self) -> None:
        """Returns when the actor's process has begun."""

    def work(self, work: Work, job: ShardJob, following: ShardJob | None, *, retry_decoding: bool = True) -> Any:
        """Do one job; begin to decode the following one meanwhile.

        Raises:
            DecodingDiedError: its pictures cannot be decoded without the death of whoever does it.
            WorkError: memory ran out; says which batch size to set.
        """
        self._retries = self._settings.decode_retries if retry_decoding else 0
        with at_work(job.events, job.told, "teach"):
            return self._work(work, replace(job, told={**job.told, **told()}), following)

    def _work(self, work: Work, job: ShardJob, following: ShardJob | None) -> Any:
        self._stop_decoding(all_but=job)
        self._start(job)
        try:
            return work(job, self._batches(job, following), *self._teacher)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            why = (str(error).splitlines() or ["MemoryError"])[0]
        finally:
            self._started.pop(job.input_hash, None)
        raise WorkError(self._memory_advice(job, why))  # outside: the error's frames hold the memory

    def _memory_advice(self, job: ShardJob, why: str) -> str:
        """Which batch size to set: the largest half, quarter and so on at which a forward pass succeeds here."""
        if "_teacher" not in self.__dict__:
            return f"the teacher does not fit into memory, whatever the batch size. {why}"
        size = job.settings.batch_size
        return memory_advice(size, largest_that_fits(self._teacher[0], job, size), why)

    def _start(self, job: ShardJob) -> None:
        if job.input_hash not in self._started:
            self._started[job.input_hash] = _decode(job)

    def _batches(self, job: ShardJob, following: ShardJob | None) -> Iterator[PreparedBatch]:
        """The decoded batches of a shard that was started. Where the decoding dies, it is begun again.

        The following shard's decoding begins once this one's has given a batch: Ray starts tasks in any order, and the
        following one, on the only core and held back with its batches unread, would keep this one from ever beginning.
        """
        taken = 0
        for retries_left in range(self._retries, -1, -1):
            try:
                for reference in islice(self._started[job.input_hash], taken, None):
                    batch: PreparedBatch = get(reference)
                    if following is not None:
                        self._start(following)
                    yield batch
                    taken += 1
                    append_event(self._events, "teach_batch", unit=job.input_hash, views=len(batch.views))
                return
            except WorkError as error:
                if not is_death(error):
                    raise
                append_event(self._events, "decoding_died", unit=job.input_hash, why=str(error)[:500])
                if not retries_left:
                    raise DecodingDiedError(f"decoding died {self._retries + 1} times: {error}") from None
                self._stop_decoding()
                self._start(job)

    def _stop_decoding(self, all_but: ShardJob | None = None) -> None:
        """Stop what is decoded ahead: held back with its batches unread, it would keep a core that others need."""
        import ray

        for unit in [unit for unit in self._started if all_but is None or unit != all_but.input_hash]:
            ray.cancel(self._started.pop(unit), force=True)


def out_of_memory(error: BaseException) -> bool:
    """Whether a worker's own error says that memory ran out, a GPU's or the machine's."""
    import torch

    # torch has no type for the machine's memory, only its allocator's words
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def largest_that_fits(forward: Forward, job: ShardJob, batch_size: int) -> int | None:
    """The largest of batch_size / 2, / 4, ... at which a forward pass on black pictures succeeds; None: none does."""
    import torch

    while batch_size := batch_size // 2:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            forward(np.zeros((batch_size, PICTURE_SIZE_PX, PICTURE_SIZE_PX, 3), np.uint8), job.settings.features.grid)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                return None
        else:
            return batch_size
    return None


def memory_advice(batch_size: int, fits: int | None, why: str) -> str:
    """What to say to whoever has to choose: the batch size is part of a cache's identity, so that we may not."""
    if batch_size == 1:
        advice = "it is the smallest there is: give the teacher more memory, or another precision"
    elif fits is None:
        advice = f"set teacher.batch_size: {max(1, batch_size // 2)}"
    else:
        advice = f"set teacher.batch_size: {fits}, which fits (tried just now)"
    return (
        f"the teacher ran out of memory at batch size {batch_size}: {advice}. The batch size is part of the cache's "
        f"identity, so a new cache begins. {why}"
    )


def _decode(job: ShardJob) -> Any:
    """Begin to decode a shard: references to its batches, as they come.

    Ray must not retry it: that would wait for a core behind the next shard's decoding, which waits for this shard.
    """
    import ray

    options = {"num_cpus": 1, "max_retries": 0, "num_returns": "streaming"}
    task = ray.remote(prepared_batches_of_job).options(**options, _generator_backpressure_num_objects=BATCHES_AHEAD)
    return task.remote(job)


def prepared_batches_of_job(job: ShardJob) -> Iterator[PreparedBatch]:
    """`prepared_batches`, in a worker of its own: one that holds no claim, whose code is therefore looked at here."""
    check_job_code()
    with at_work(job.events, job.told, "decode"):
        yield from prepared_batches(job)
