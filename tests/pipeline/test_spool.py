from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from pipeline.delivery import Courier
from pipeline.spool import POSITION, Position, Record, Spool, unfinished_spools
from pipeline.tracking import RefusedError, Tracker, UnreachableError
from storage.errors import DamageError


class Store:
    """What a store is to a courier; its answer to each call may get lost, before or after it did what was asked."""

    def __init__(self) -> None:
        self.runs: dict[str, str] = {}
        """Spool -> run."""
        self.points: list[tuple[str, int, float]] = []
        self.put_records: list[tuple[str, Any]] = []
        self.calls = 0
        self.losses: dict[int, str] = {}
        """Call number -> "before" or "after"."""
        self.refuses: str | None = None

    def _lost(self, when: str) -> None:
        if self.losses.get(self.calls) == when:
            raise UnreachableError(f"call {self.calls}")

    def has(self, run_id: str) -> bool:
        return run_id in self.runs.values()

    def run_of(self, spool: str) -> str | None:
        return self.runs.get(spool)

    def begin(self, start: Record, parent: str | None) -> str:
        self.calls += 1
        self._lost("before")
        assert start.fields["spool"] not in self.runs
        self.runs[start.fields["spool"]] = f"run-{len(self.runs)}"
        self._lost("after")
        return self.runs[start.fields["spool"]]

    def metrics(self, run_id: str, records: list[Record], *, in_doubt: bool) -> None:
        self.calls += 1
        self._lost("before")
        sent = [(key, r.fields["step"], value) for r in records for key, value in r.fields["values"].items()]
        self.points += [point for point in sent if not in_doubt or point not in self.points]
        self._lost("after")

    def put(self, run_id: str, record: Record, folder: Path) -> None:
        self.calls += 1
        if record.kind == self.refuses:
            raise RefusedError("no")
        self._lost("before")
        if (record.kind, record.fields) not in self.put_records:
            self.put_records.append((record.kind, record.fields))
        self._lost("after")


def courier(spool: Spool, store: Store, **how: Any) -> Courier:
    return Courier(spool, cast(Tracker, store), **how)


def begin(folder: Path, **fields: Any) -> Spool:
    spool = Spool(folder)
    spool.append("start", once="start", **{"name": "a", "spool": folder.name, "parent": None, "tags": {}, **fields})
    return spool


def log_steps(spool: Spool, *steps: int) -> None:
    for step in steps:
        spool.append("metrics", once=f"step/{step}", step=step, values={"loss": 1 / step, "lr": 0.5})


def points(*steps: int) -> list[tuple[str, int, float]]:
    return [point for step in steps for point in (("loss", step, 1 / step), ("lr", step, 0.5))]


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    spool = begin(tmp_path / "s")
    values = {"loss": 0.1 + 0.2, "lr": 1e-300, "nan": float("nan")}
    spool.append("metrics", step=3, values=values)
    start, metrics = spool.records()
    assert (start.kind, start.fields["name"]) == ("start", "a")
    assert repr(metrics.fields["values"]) == repr(values)
    assert metrics.end == spool.path.stat().st_size
    assert list(spool.records(start.end)) != []
    assert list(spool.records(metrics.end)) == []


@pytest.mark.parametrize("kept", [1, 10, -1])
def test_a_torn_last_line_does_not_count_and_is_cut_off(tmp_path: Path, kept: int) -> None:
    spool = begin(tmp_path / "s")
    log_steps(spool, 1, 2)
    whole = spool.path.read_bytes()
    lines = whole.splitlines(keepends=True)
    spool.path.write_bytes(b"".join(lines[:-1]) + lines[-1][:kept])
    assert len(list(spool.records())) == 2
    store = Store()
    courier(spool, store).deliver()
    assert store.points == points(1)
    resumed = Spool(spool.folder)  # another process
    log_steps(resumed, 1, 2, 3)
    courier(resumed, store).deliver()
    assert store.points == points(1, 2, 3)
    assert b"".join(lines[:-1]) == resumed.path.read_bytes()[: len(b"".join(lines[:-1]))]


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    spool = begin(tmp_path / "s")
    with spool.path.open("ab") as file:
        file.write(b"{]\n")
    with pytest.raises(DamageError, match="before byte"):
        list(spool.records())


def test_what_is_told_twice_is_kept_once(tmp_path: Path) -> None:
    spool = begin(tmp_path / "s")
    log_steps(spool, 1, 2)
    log_steps(spool, 2, 3)
    log_steps(Spool(spool.folder), 1, 2, 3, 4)
    assert [record.fields["step"] for record in spool.records() if record.kind == "metrics"] == [1, 2, 3, 4]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", range(1, 6))
def test_each_point_arrives_once_wherever_an_answer_is_lost(tmp_path: Path, call: int, when: str) -> None:
    spool, store = begin(tmp_path / "s"), Store()
    store.losses = {call: when}
    log_steps(spool, 1, 2)
    spool.append("params", once="params", values={"a": "1"})
    log_steps(spool, 3)
    spool.append("status", status="FINISHED")
    with pytest.raises(UnreachableError):
        courier(spool, store).deliver()
    courier(Spool(spool.folder), store).deliver()
    assert store.runs == {"s": "run-0"}
    assert store.points == points(1, 2, 3)
    assert [kind for kind, _ in store.put_records] == ["params", "status"]
    assert spool.position() == Position("run-0", spool.path.stat().st_size, "FINISHED")
    assert spool.left() == 0


def test_the_same_courier_goes_on_after_a_loss(tmp_path: Path) -> None:
    spool, store = begin(tmp_path / "s"), Store()
    log_steps(spool, 1)
    one = courier(spool, store)
    one.deliver()
    store.losses = {3: "after"}
    log_steps(spool, 2)
    with pytest.raises(UnreachableError):
        one.deliver()
    log_steps(spool, 3)
    one.deliver()
    assert store.points == points(1, 2, 3)


def test_a_lost_position_is_found_again(tmp_path: Path) -> None:
    spool, store = begin(tmp_path / "s"), Store()
    log_steps(spool, 1, 2)
    courier(spool, store).deliver()
    (spool.folder / POSITION).unlink()
    courier(spool, store).deliver()
    assert store.runs == {"s": "run-0"}
    assert store.points == points(1, 2)


def test_a_store_that_does_not_know_the_run_gets_the_whole_story(tmp_path: Path) -> None:
    spool = begin(tmp_path / "s")
    log_steps(spool, 1, 2)
    courier(spool, Store()).deliver()
    log_steps(spool, 3)
    other = Store()
    courier(spool, other).deliver()
    assert other.points == points(1, 2, 3)


def test_what_the_store_refuses_is_left_out_and_told(tmp_path: Path) -> None:
    spool, store = begin(tmp_path / "s"), Store()
    store.refuses = "artifact"
    log_steps(spool, 1)
    spool.append("artifact", path="gone", folder=None)
    log_steps(spool, 2)
    courier(spool, store).deliver()
    assert store.points == points(1, 2)
    assert spool.position().refused == ("artifact: no",)


def test_a_run_waits_for_its_parent_unless_that_will_never_come(tmp_path: Path) -> None:
    spool, store = begin(tmp_path / "child", parent="parent"), Store()
    with pytest.raises(UnreachableError, match="not there yet"):
        courier(spool, store).deliver()
    courier(spool, store, without_parent=True).deliver()
    assert store.runs == {"child": "run-0"}


def test_one_delivers_at_a_time(tmp_path: Path) -> None:
    spool = begin(tmp_path / "s")
    with spool.delivering() as ours, Spool(spool.folder).delivering() as theirs:
        assert (ours, theirs) == (True, False)
    with Spool(spool.folder).delivering() as theirs:
        assert theirs


def test_unfinished_are_those_with_something_left_or_without_an_end(tmp_path: Path) -> None:
    store = Store()
    for name in ("ended", "going-on", "left"):
        log_steps(begin(tmp_path / name), 1)
    ended, going_on, left = (Spool(tmp_path / name) for name in ("ended", "going-on", "left"))
    ended.append("status", status="FINISHED")
    courier(ended, store).deliver()
    courier(going_on, store).deliver()
    left.append("status", status="FINISHED")
    assert [spool.folder.name for spool in unfinished_spools(tmp_path)] == ["going-on", "left"]
    assert (going_on.status(), left.status(), left.left()) == ("RUNNING", "FINISHED", 3)
