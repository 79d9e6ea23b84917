"""A student of two workers, one of which is terminated and then one killed, beside a student that trains by itself."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ClusterConfig
from pipeline.events import EventTail, append_event
from pipeline.training_group import LOCK, GroupWork, train_together
from pipeline.workdir import Workdir, claim_of
from pipeline.workers import Resources, ray_session, run_units
from storage.errors import DamageError, WorkError
from tests.faults.driver import PATIENCE_S, send
from tests.trainer import pair
from tests.trainer.jobs import tiny_job
from tests.trainer.test_distributed import in_pairs
from trainer.job import Silent, TrainJob, TrainResult
from trainer.loop import train

pytestmark = pytest.mark.timeout(1800)

STEPS = 14
HALF = Resources(cpus=0.5, workers=2)
Event = dict[str, Any]


class Slowly(Silent):
    """Tells the event log, waits until another student trains, and leaves time to be disturbed in."""

    def __init__(self, events: Path, label: str, pause_s: float, beside: str | None) -> None:
        self._events, self._label, self._pause_s, self._beside = events, label, pause_s, beside

    def on_start(self, params: Mapping[str, Any]) -> None:
        append_event(self._events, "train_started", unit=self._label)
        deadline = time.monotonic() + PATIENCE_S
        while self._beside is not None and self._beside not in units_begun(self._events):
            assert time.monotonic() < deadline, f"{self._beside} did not begin while {self._label} was training"
            time.sleep(0.1)

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        append_event(self._events, "train_step", unit=self._label, step=step)
        time.sleep(self._pause_s)

    def on_end(self, result: TrainResult) -> None:
        append_event(self._events, "train_done", unit=self._label, teacher="models.teacher" in sys.modules)


@contextmanager
def slowly(events: Path, label: str, pause_s: float, beside: str | None) -> Iterator[Slowly]:
    yield Slowly(events, label, pause_s, beside)


def units_begun(events: Path) -> set[str]:
    return {item["unit"] for item in EventTail(events, from_start=True).new() if item["event"] == "train_started"}


@dataclass(frozen=True)
class Unit:
    work: GroupWork
    resources: Resources
    max_retries: int = 2


def train_unit(unit: Unit) -> TrainResult:
    if unit.resources.workers > 1:
        return train_together(unit.work, unit.resources, max_retries=unit.max_retries, loopback=True)
    with unit.work.reporting() as reporter:
        return train(unit.work.job, reporter)


def unit_of(
    job: TrainJob,
    label: str,
    resources: Resources,
    *,
    pause_s: float = 0.0,
    beside: str | None = None,
    max_retries: int = 2,
) -> Unit:
    workdir = Workdir(job.out_dir.parent / "work")
    reporting = partial(slowly, workdir.events, label, pause_s, beside)
    work = GroupWork(
        dataclasses.replace(job, out_dir=job.out_dir.parent / label),
        label,
        claim_of(workdir),
        workdir.events,
        reporting,
        threads=1,
    )
    return Unit(work, resources, max_retries)


def run(units: list[Unit], while_waiting: Callable[[], None] = lambda: None) -> Iterator[tuple[Unit, Any]]:
    work = units[0].work
    return run_units(
        train_unit,
        units,
        cluster=ClusterConfig(max_retries=0),
        claim=work.claim,
        resources=lambda unit: unit.resources,
        while_waiting=while_waiting,
        fresh_process=True,
    )


class Disturbance:
    """SIGTERM to the second worker after its third step, SIGKILL to the first of its successors three steps later."""

    def __init__(self, events: Path, label: str) -> None:
        self._tail, self._label = EventTail(events, from_start=True), label
        self.seen: list[Event] = []
        self.sent: list[tuple[signal.Signals, int]] = []
        """And after how many events of this student."""

    def __call__(self) -> None:
        self.seen += [event for event in self._tail.new() if event.get("unit") == self._label]
        workers = {event["rank"]: event["pid"] for event in self.seen if event["event"] == "train_worker"}
        steps = [event["step"] for event in self.seen if event["event"] == "train_step"]
        starts = sum(event["event"] == "train_started" for event in self.seen)
        if not self.sent and steps and steps[-1] >= 3:
            self._send(workers[1], signal.SIGTERM)
        elif len(self.sent) == 1 and starts == 2 and steps[-1] >= 9:
            self._send(workers[0], signal.SIGKILL)

    def _send(self, pid: int, number: signal.Signals) -> None:
        send(pid, number)
        self.sent.append((number, len(self.seen)))


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with ray_session(ClusterConfig()):
            yield


@dataclass
class Story:
    calm: TrainJob
    disturbed: Unit
    events: list[Event]
    disturbance: Disturbance

    def of(self, label: str, event: str) -> list[Event]:
        return [item for item in self.events if item.get("unit") == label and item["event"] == event]


@pytest.fixture(scope="module")
def story(ray: None, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("group")
    job = tiny_job(folder, steps=STEPS, checkpoint_every=4, validate_every=7, batch_size=4)
    disturbed = unit_of(job, "disturbed", HALF, pause_s=0.4, beside="beside")
    beside = unit_of(job, "beside", Resources(cpus=1), beside="disturbed")
    events = disturbed.work.events
    disturbance = Disturbance(events, "disturbed")
    list(run([disturbed, beside], disturbance))
    in_pairs(folder, {"calm": pair.Task("train", job)})
    return Story(
        dataclasses.replace(job, out_dir=folder / "calm"),
        disturbed,
        list(EventTail(events, from_start=True).new()),
        disturbance,
    )


def test_it_ends_with_the_bytes_of_two_workers_that_nobody_disturbed(story: Story) -> None:
    assert [number for number, _ in story.disturbance.sent] == [signal.SIGTERM, signal.SIGKILL]
    mine, calm = story.disturbed.work.job.out_dir, story.calm.out_dir
    for name in ("student/weights.safetensors", "student/student.json", "pictures.png"):
        assert (mine / name).read_bytes() == (calm / name).read_bytes()
    assert sorted(path.name for path in mine.iterdir()) == ["pictures.png", "result.json", "student", LOCK]


def test_it_goes_on_from_the_last_checkpoint_with_other_workers(story: Story) -> None:
    workers = story.of("disturbed", "train_worker")
    assert sorted(event["rank"] for event in workers) == [0, 0, 0, 1, 1, 1]
    assert len({event["pid"] for event in workers}) == 6
    steps = [event["step"] for event in story.of("disturbed", "train_step")]
    assert set(steps) == set(range(1, STEPS + 1))
    again = [at for at in range(1, len(steps)) if steps[at] <= steps[at - 1]]
    assert len(again) <= 1  # SIGTERM cost no step: both stopped after a checkpoint
    assert len(steps) <= STEPS + 4
    assert [event["teacher"] for event in story.of("disturbed", "train_done")] == [False]


def test_another_student_trains_at_the_same_time(story: Story) -> None:
    """Each waited for the other's beginning, which they could not have seen one after the other."""
    (begun,), (ended,) = story.of("beside", "train_started"), story.of("beside", "train_done")
    started, (done,) = story.of("disturbed", "train_started"), story.of("disturbed", "train_done")
    assert max(begun["time"], started[0]["time"]) < min(ended["time"], done["time"])


@pytest.mark.slow  # more starts of workers
def test_an_error_that_would_come_again_ends_the_run_at_once(ray: None, tmp_path: Path) -> None:
    unit = unit_of(tiny_job(tmp_path, steps=STEPS), "damaged", HALF)
    shard = next(path for path in (tmp_path / "cache").glob("*/shards/*.zarr"))
    for chunk in (shard / "labels/keypoints_2d").glob("c*"):
        chunk.write_bytes(bytes(len(chunk.read_bytes())))
    with pytest.raises(DamageError, match="keypoints_2d"):
        list(run([unit]))
    begun = [event for event in EventTail(unit.work.events, from_start=True).new() if event["event"] == "train_worker"]
    assert len(begun) == 2


@pytest.mark.slow  # more starts of workers
def test_workers_that_keep_dying_end_the_run(ray: None, tmp_path: Path) -> None:
    unit = unit_of(tiny_job(tmp_path, steps=200), "dying", HALF, pause_s=0.1, max_retries=1)
    tail, begun = EventTail(unit.work.events, from_start=True), list[int]()

    def kill() -> None:
        for event in tail.new():
            if event["event"] == "train_worker" and event["rank"] == 1:
                begun.append(event["pid"])
                send(event["pid"], signal.SIGKILL)

    with pytest.raises(WorkError, match="dying: workers died too often"):
        list(run([unit], kill))
    assert len(begun) == 2
