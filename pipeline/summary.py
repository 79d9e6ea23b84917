"""What a run tells its operator: what had changed, what was computed, what was left out and why, what it cost.

The same document goes to the log, to MLflow (on the pipeline's run), into the workdir, to `run --json` and to whoever
is to be notified; also when the run failed, as far as it came.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from pipeline.caches import cache_state
from pipeline.events import EventTail, append_event, told
from pipeline.experiment import Experiment
from pipeline.job_code import JOB_FILE
from pipeline.manifests import ManifestIndex, manifests_of
from pipeline.plan import StagePlan, StageResult
from pipeline.tables import human_bytes
from pipeline.usage import costs_by_stage, processor_seconds, total_cost
from storage.durable import canonical_json, write_bytes_atomic
from storage.errors import BusyError, DamageError, InputError, WorkError

log = logging.getLogger("handstill")

WHY_LINES, SAMPLES_NAMED = 50, 20
"""Of a stage's reasons, and of the samples that were left out; there may be millions."""
_KINDS = {
    InputError: "input",
    BusyError: "busy",
    DamageError: "damage",
    WorkError: "work",
    KeyboardInterrupt: "stopped",
}
_UNIT_DONE = ("synthesise_done", "ingest_done", "shard_committed", "train_done", "evaluate_done", "compare_done")
"""One of them for each unit of work that a run finished."""


class RunSummary:
    """The summary of one run, put together while it goes on."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._started = datetime.now(UTC)
        self._since = time.monotonic()
        self._tail = EventTail(experiment.workdir.events)
        self._plans: dict[str, StagePlan] = {}
        self._results: dict[str, StageResult] = {}
        self.cleaned: dict[str, Any] | None = None
        """What `clean` says, where it ran at the end."""
        self.document: dict[str, Any] = {}
        """Empty until the run has ended."""

    @contextmanager
    def stage(self, name: str, plan: StagePlan) -> Iterator[None]:
        """Around a stage: what it is to do, and what the run's own process uses for it."""
        self._plans[name] = plan
        before, started = processor_seconds(), time.monotonic()
        try:
            yield
        finally:
            used = {"cpu_s": processor_seconds() - before, "gpu_s": 0.0, "busy_s": time.monotonic() - started}
            with suppress(OSError):
                rounded = {key: round(value, 3) for key, value in used.items()}
                append_event(self._experiment.workdir.events, "usage", what="driver", **rounded)

    def finished(self, name: str, plan: StagePlan, result: StageResult) -> None:
        """A stage is done."""
        self._plans[name], self._results[name] = plan, result

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Around a run that holds the workdir: its summary is logged and kept there, however it ends."""
        try:
            yield
        except BaseException as error:
            with suppress(OSError, InputError, WorkError, DamageError):  # what it failed of is told, not this
                self.end(error)
                self._keep()
            raise
        self.end(None)
        self._keep()

    def end(self, error: BaseException | None) -> None:
        """The run is over; once. error: why it failed."""
        if self.document:
            return
        experiment = self._experiment
        run = told().get("run")  # None: it never had the workdir, and what happens there is another's
        events = [event for event in self._tail.new() if run is not None and event.get("run") == run]
        costs = costs_by_stage(events)
        cost = total_cost(costs.values())
        wall_s = round(time.monotonic() - self._since, 3)
        stages = {name: self._stage(name, events) | costs[name].as_json() for name in self._plans if name in costs}
        stages |= {name: self._stage(name, events) for name in self._plans if name not in costs}
        self.document = {
            "name": experiment.config.name,
            "run": run,
            "config": os.environ.get(JOB_FILE, str(experiment.file)),
            "workdir": experiment.workdir.place,
            "outcome": "success" if error is None else "failure",
            "failure": None if error is None else {"kind": kind_of(error), "error": told_of(error)},
            "started": self._started.isoformat(timespec="seconds"),
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "since": self._run_before(),
            "nothing_to_do": error is None and not any(plan.todo or plan.reasons for plan in self._plans.values()),
            "changed": {name: _changed(plan) for name, plan in self._plans.items() if plan.todo or plan.reasons},
            "stages": {name: stages[name] for name in self._plans},
            "quarantined": self._quarantined(events),
            "cost": {"wall_s": wall_s, **cost.as_json()},
            "cleaned": None if self.cleaned is None else {key: self.cleaned[key] for key in ("stale", "bytes", "kept")},
        }
        self.document["text"] = "\n".join(summary_lines(self.document))

    def _stage(self, name: str, events: list[dict[str, Any]]) -> dict[str, Any]:
        """What `run --json` says of a stage; of one that failed, what it finished before."""
        if name in self._results:
            return self._results[name].as_json()
        units = {event.get("unit") for event in events if event.get("stage") == name and event["event"] in _UNIT_DONE}
        plan = self._plans[name]
        return StageResult(len(units), plan.total - plan.todo).as_json() | {"unfinished": True}

    def _run_before(self) -> str | None:
        """When the last run that has a summary ended."""
        try:
            return str(json.loads(self._experiment.workdir.summary.read_bytes())["ended"])
        except (OSError, ValueError, KeyError, TypeError):
            return None  # there was none, or it says nothing

    def _quarantined(self, events: list[dict[str, Any]]) -> dict[str, Any]:
        """How many samples are left out, and which of them since this run."""
        new: dict[str, str] = {}
        try:
            new = dict(_newly_quarantined(self._experiment, events))
        except (InputError, DamageError, OSError):  # the run failed of the same
            log.debug("what was quarantined is not known", exc_info=True)
        total = max((result.quarantined for result in self._results.values()), default=0)
        kinds = Counter(kind_of_reason(reason) for reason in new.values())
        return {
            "total": total,
            "new": len(new),
            "reasons": dict(kinds.most_common()),
            "samples": [{"sample_id": name, "reason": new[name]} for name in list(new)[:SAMPLES_NAMED]],
        }

    def _keep(self) -> None:
        """In the log, in the workdir, in MLflow."""
        for line in self.document["text"].splitlines():
            log.info("%s", line)
        workdir = self._experiment.workdir
        data = canonical_json(self.document)
        stamp = self._started.strftime("%Y%m%dT%H%M%S")
        path = workdir.summaries / f"{stamp}-{self.document['run'] or 'run'}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomic(path, data)
        write_bytes_atomic(workdir.summary, data)
        if not self.document["nothing_to_do"]:
            self._tell_mlflow()

    def _tell_mlflow(self) -> None:
        from pipeline.run_log import current_run

        run = current_run()
        if run is None:  # nothing was taught, trained or scored: MLflow has no run of it
            return
        values = {
            f"{stage}/{key}": value
            for stage, facts in self.document["stages"].items()
            for key, value in facts.items()
            if isinstance(value, int | float)
        }
        totals = {f"cost/{key}": value for key, value in self.document["cost"].items()}
        run.metrics(values | totals | {"quarantined/new": self.document["quarantined"]["new"]})
        run.artifact(self._experiment.workdir.summary, once="summary")


def kind_of(error: BaseException) -> str:
    """What went wrong, in a word: input, busy, damage, work, stopped, or error for what nobody foresaw."""
    return next((word for kind, word in _KINDS.items() if isinstance(error, kind)), "error")


def told_of(error: BaseException) -> str:
    """An error for an event log or a document: not longer than a line there may be."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped by a signal"
    return (str(error) if kind_of(error) != "error" else f"{type(error).__name__}: {error}")[:2000]


def kind_of_reason(reason: str) -> str:
    """`filtered: min_keypoints` of `filtered: min_keypoints: 3 of 21`: what many samples may have in common."""
    first, _, rest = reason.partition(": ")
    return f"{first}: {rest.partition(':')[0]}" if first == "filtered" else first


def _changed(plan: StagePlan) -> dict[str, Any]:
    return {
        "reasons": dict(plan.reasons),
        "why": list(plan.why[:WHY_LINES]),
        "more": max(0, len(plan.why) - WHY_LINES),
        "changes": [change.as_json() for change in plan.changes],
    }


def _newly_quarantined(experiment: Experiment, events: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """(sample, reason) of what this run's scans and shards left out."""
    scanned = {event["unit"] for event in events if event["event"] == "ingest_done"}
    committed = {event["unit"] for event in events if event["event"] == "shard_committed"}
    if scanned:
        index = ManifestIndex(experiment)
        for name, config in {name: config for _, name, config in experiment.datasets_by_role()}.items():
            for source, manifest in manifests_of(experiment, name, config, index):
                if manifest is not None and str(source.path) in scanned:
                    bad = manifest.table.filter(manifest.table["reason"].is_valid())
                    yield from zip(bad["sample_id"].to_pylist(), bad["reason"].to_pylist(), strict=True)
    if committed:
        for role in ("train", "evaluate"):
            records = cache_state(experiment, role).records
            for input_hash in sorted(committed & records.keys()):
                yield from ((sample.sample_id, sample.reason) for sample in records[input_hash].quarantined)


def summary_lines(document: Mapping[str, Any]) -> Iterator[str]:
    """The summary for a person."""
    wall = f"{document['cost']['wall_s']:.0f} s"
    failure = document["failure"]
    if failure is not None:
        yield f"{document['name']}: failed after {wall}: {failure['error']}"
    elif document["nothing_to_do"]:
        yield f"{document['name']}: nothing to do, {wall}"
    else:
        yield f"{document['name']}: done in {wall}"
    for name, change in document["changed"].items():
        facts = document["stages"][name]
        reasons = ", ".join(f"{count} {reason}" for reason, count in change["reasons"].items()) or "nothing new"
        yield f"  {name}: {reasons}; {facts['done']} computed{_cost_text(facts)}"
    bad = document["quarantined"]
    if bad["new"]:
        why = ", ".join(f"{count} {reason}" for reason, count in bad["reasons"].items())
        yield f"  quarantined: {bad['new']} samples more, {bad['total']} in all: {why}"
    if document["cleaned"] is not None and document["cleaned"]["stale"]:
        gone = document["cleaned"]
        yield f"  cleaned: {len(gone['stale'])} stale outputs, {human_bytes(gone['bytes'])}"
    if not document["nothing_to_do"]:
        yield f"  cost: {wall}{_cost_text(document['cost'])}"


def _cost_text(facts: Mapping[str, Any]) -> str:
    parts = [f"{facts['cpu_hours']:g} CPU-hours"] if facts.get("cpu_hours") else []
    parts += [f"{facts['gpu_hours']:g} GPU-hours"] if facts.get("gpu_hours") else []
    parts += [f"{human_bytes(facts['bytes_written'])} written"] if facts.get("bytes_written") else []
    return "".join(f", {part}" for part in parts)
