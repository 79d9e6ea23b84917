"""A run that is killed again and again, its workers too, and goes on each time; beside it one that nobody disturbed.

Both end with the train stage, to keep this short; test_chaos.py kills in the other stages.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from storage.cache import CacheFolder
from tests.faults.driver import (
    PATIENCE_S,
    Driver,
    LateWorker,
    is_worker,
    read_events,
    run,
    send,
    sick,
    workdir_of,
    workers_of,
)
from tests.faults.experiment import SHARDS, STEPS, beside, leftovers, prepare, results
from tests.tiny_experiment import configure

pytestmark = pytest.mark.timeout(1800)

TRAIN = ("run", "train")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run that nobody disturbed."""
    config = prepare(tmp_path_factory.mktemp("faults"))
    code, said = run(config, *TRAIN)
    assert code == 0, said
    return config


@dataclass
class Story:
    """What happened to the disturbed run."""

    config: Path
    interruptions: list[int] = field(default_factory=list)
    """Lines of the event log at each."""
    stops: dict[str, tuple[int, float, str]] = field(default_factory=dict)
    """By signal: exit code, seconds until the end, what it said."""
    given_up: tuple[int, str] = (0, "")
    """Exit code and message of the run whose every teacher was killed."""
    waited: bool = False
    """Whether a run waited for the late worker of the one before."""
    orphans: list[int] = field(default_factory=list)

    def note(self) -> None:
        self.interruptions.append(len(read_events(self.config)))


@pytest.fixture(scope="module")
def story(calm: Path) -> Story:
    story = Story(beside(calm, "disturbed"))
    every_teacher(story)
    between_shards(story)
    after_a_checkpoint(story, inside_a_shard(story))
    code, said = run(story.config, *TRAIN)
    assert code == 0, said
    return story


def every_teacher(story: Story) -> None:
    """Whatever teacher begins is killed, until the run gives up."""
    configure(story.config, {"cluster.max_retries": 1})
    with Driver(story.config, TRAIN) as driver:
        for _ in range(2):
            send(driver.wait_for("shard_started")["pid"], signal.SIGKILL)
            story.note()
        story.given_up = driver.finish(), driver.said
    configure(story.config, {"cluster.max_retries": 3})


def between_shards(story: Story) -> None:
    with Driver(story.config, TRAIN) as driver:
        driver.wait_for("shard_committed")
        story.stops["SIGTERM"] = *driver.signal(signal.SIGTERM), driver.said
        story.note()


def inside_a_shard(story: Story) -> LateWorker:
    """Kill the driver in the middle of a shard; a worker of its run does not notice."""
    with Driver(story.config, TRAIN) as driver:
        driver.freeze_inside_a_shard()
        late = LateWorker(story.config)
        story.orphans += driver.kill()
        story.note()
    return late


def after_a_checkpoint(story: Story, late: LateWorker) -> None:
    """Kill a worker of every kind, which the run survives, then the driver."""
    with Driver(story.config, TRAIN) as driver:
        driver.wait_until(lambda: "waiting for workers" in driver.said, "waiting for the late worker")
        story.stops["SIGINT"] = *driver.signal(signal.SIGINT), driver.said
    # so slow that there is a decoder wherever its teacher is stopped
    with Driver(story.config, TRAIN, sick({"at": "decode", "sample": "any", "how": "slow", "seconds": 0.15})) as driver:
        driver.wait_until(lambda: "waiting for workers" in driver.said, "waiting for the late worker")
        story.waited = not any(event["event"] == "stage_started" for event in driver.events()[driver.seen :])
        late.end()

        send(driver.freeze_inside_a_shard()["pid"], signal.SIGKILL)
        story.note()
        kill_a_decoder(driver)
        send(driver.wait_for("train_step", step=2)["pid"], signal.SIGKILL)
        driver.wait_for("train_started")
        driver.wait_for("train_step", step=4)
        story.orphans += driver.kill()


def kill_a_decoder(driver: Driver) -> None:
    """Kill processes that decode ahead while their teacher stands still, until it misses one: some have done all."""
    while not any(event["event"] == "decoding_died" for event in driver.events()):
        teacher = driver.freeze_inside_a_shard()["pid"]
        for decoder in workers_of(driver.process.pid, "prepared_batches"):
            send(decoder, signal.SIGKILL)
        send(teacher, signal.SIGCONT)


def test_what_was_killed_and_went_on_ends_with_the_same_bytes(calm: Path, story: Story) -> None:
    """Every file of the caches, ledger and snapshots included; every student's weights."""
    undisturbed = results(calm)
    assert results(story.config) == undisturbed
    assert len([name for name in undisturbed if name.endswith("weights.safetensors")]) == 1
    assert len([name for name in undisturbed if "/ledger/" in name]) == SHARDS


def test_nothing_half_written_is_left(story: Story) -> None:
    assert leftovers(story.config) == []


def test_no_worker_is_left(story: Story) -> None:
    """Ray ends what its killed driver left; those that write nothing it ends when it comes to it."""
    assert story.orphans
    deadline = time.monotonic() + PATIENCE_S
    while [pid for pid in story.orphans if is_worker(pid)] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in story.orphans if is_worker(pid)] == []


def test_every_shard_is_committed_once_and_not_begun_again_afterwards(story: Story) -> None:
    finished: set[str] = set()
    for event in read_events(story.config):
        if event["event"] in ("shard_committed", "shard_adopted"):
            assert event["unit"] not in finished
            finished.add(event["unit"])
        assert event["event"] != "shard_started" or event["unit"] not in finished
    (recorded,) = [
        len(list(root.glob("ledger/*"))) for root in caches(story.config) if len(list(root.glob("ledger/*"))) > 1
    ]
    assert recorded == SHARDS - 1
    assert len(finished) == SHARDS


def test_a_shard_is_begun_again_only_where_something_hit_it(story: Story) -> None:
    events = read_events(story.config)
    begun = Counter(event["unit"] for event in events if event["event"] == "shard_started")
    hits: Counter[str] = Counter()
    for line in story.interruptions:
        hits.update(under_way(events[:line]))
    assert sum(hits.values()) >= 4
    assert {unit: count for unit, count in begun.items() if count > 1 + hits[unit]} == {}


def under_way(events: list[dict[str, Any]]) -> set[str]:
    """Shards that were begun and not committed."""
    units: set[str] = set()
    for event in events:
        if event["event"] == "shard_started":
            units.add(event["unit"])
        elif event["event"] in ("shard_committed", "shard_adopted"):
            units.discard(event["unit"])
    return units


def caches(config: Path) -> Iterator[Path]:
    return (workdir_of(config) / "cache").iterdir()


def test_a_run_waits_for_the_orphans_of_the_one_before(story: Story) -> None:
    assert story.waited


def test_a_training_goes_on_from_its_checkpoint(story: Story) -> None:
    """Steps 1 and 2 once; the worker's death costs step 3 at most, the driver's step 5 at most."""
    steps = Counter(event["step"] for event in read_events(story.config) if event["event"] == "train_step")
    assert set(steps) == set(range(1, STEPS + 1))
    assert all(count <= 2 for count in steps.values()), steps
    assert sum(steps.values()) <= STEPS + 2
    started = sum(event["event"] == "train_started" for event in read_events(story.config))
    assert started in (2, 3)  # 2 where the killed driver's orphan was fast enough to end the training before it died


def test_a_shard_whose_teachers_keep_dying_ends_the_run(story: Story) -> None:
    code, said = story.given_up
    assert code == 1
    assert "teachers died 2 times on one shard of alpha" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stopped_run_says_so_and_ends_at_once(story: Story, name: str, code: int) -> None:
    exit_code, seconds, said = story.stops[name]
    assert exit_code == code
    assert seconds < 20
    assert said.splitlines()[-1].startswith(f"handstill: stopped by {name}; ")
    assert "Traceback" not in said


def test_the_ledger_describes_what_is_there(story: Story) -> None:
    for root in caches(story.config):
        folder = CacheFolder(root)
        assert folder.unrecorded() == []
        assert {path.stem for path in folder.shards_dir.iterdir()} == folder.finished().keys()
