"""The gate: whether the best student, or each that is named, is good enough; by how much it is not, and how sure.

Limits are looked at with means over seeds. Against a baseline the same samples are compared pair by pair, and it is the
interval of the difference that decides, or, in doubt, what the configuration says (`compare.gate.in_doubt`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from storage.errors import InputError
from trainer.config import METRIC_TITLES, REGISTERED, TRAINED, GateConfig, better_by
from trainer.pairing import Group, Paired, paired, same_truth
from trainer.runs import Runs, Scores, split_registered

Document = dict[str, Any]

_PER_SAMPLE = ("pa_mpjpe_mm", "pa_mpvpe_mm", "mpjpe_mm", "f5", "f15")
"""Metrics that are means over samples, so that a difference has an interval."""


@dataclass(frozen=True)
class Baseline:
    """Who the students are held against."""

    name: str
    """As the configuration says it."""
    runs: Group
    version: str | None = None
    """In the model registry."""

    @property
    def told(self) -> str:
        student = self.runs[0].name
        return self.name if self.version is None else f"{self.name} (version {self.version}, {student})"


@dataclass(frozen=True)
class Judge:
    """The gate, with what it needs to look at a group of runs; the same for a student's seeds and for one of them."""

    gate: GateConfig
    runs: Runs
    metrics: Scores
    """Of the teacher."""
    mean_pose: Scores
    baseline: Baseline | None
    """None: there is none to be held against."""
    resamplings: int

    def checks(self, name: str, group: Group) -> list[Document]:
        """Everything that the gate asks of a student, each with a sentence for a person."""
        gate, value = self.gate, mean_score(group, self.gate)
        assert value is not None, f"{name} was not scored"
        found = [
            {
                "student": name,
                "what": what,
                "value": value,
                "limit": limit,
                "passed": passed,
                "sentence": _limit_sentence(name, gate, value, what, limit, passed),
            }
            for what, limit, or_equal in self._limits()
            for passed in [better(gate.metric, value, limit) or (or_equal and value == limit)]
        ]
        if self.baseline is not None:
            found.append(self._against_baseline(name, group, value, self.baseline))
        return found

    def caveat(self, name: str, group: Group) -> str | None:
        """What whoever reads that a student passed must know: that an answer without looking would nearly do as well.

        None: it is far better than the mean pose, or nobody knows, or the gate itself says that it is not.
        """
        gate, value = self.gate, mean_score(group, self.gate)
        mean_pose = self.mean_pose.get(gate.dataset, {}).get(gate.metric)
        if value is None or not mean_pose:
            return None
        gain = 1 - value / mean_pose if better(gate.metric, value, mean_pose) else 0.0
        if gain > 0 and (gate.metric != "pa_mpjpe_mm" or gain >= TRAINED):
            return None
        if gain == 0 and gate.better_than_mean_pose:
            return None
        compared = (
            f"Beware: {name} ({_amount(gate, value)}) is {better_by(gain)} answering the mean pose to every picture "
            f"({_amount(gate, mean_pose)} {_title(gate)})"
        )
        if gain > 0:
            return f"{compared}: it was trained too little to be of use, whomever it beats."
        return (
            f"{compared}, so it is of no use yet, whomever it beats; "
            "compare.gate.better_than_mean_pose makes the gate ask for that."
        )

    def _limits(self) -> Iterator[tuple[str, float, bool]]:
        """Name, value, and whether being equal to it is good enough, of each limit that the gate sets."""
        gate = self.gate
        if gate.limit is not None:
            yield "limit", gate.limit, True
        if gate.teacher_ratio is not None:
            yield "teacher_ratio", gate.teacher_ratio * self._of_teacher("teacher_ratio", self.metrics), True
        if gate.better_than_mean_pose:
            yield "better_than_mean_pose", self._of_teacher("better_than_mean_pose", self.mean_pose), False

    def _of_teacher(self, what: str, scores: Scores) -> float:
        value = scores.get(self.gate.dataset, {}).get(self.gate.metric)
        if value is None:
            raise InputError(
                f"compare.gate.{what}: the teacher's run has no {self.gate.metric} on {self.gate.dataset}; "
                "run `handstill run evaluate`, or leave it out"
            )
        return value

    def _against_baseline(self, name: str, group: Group, value: float, baseline: Baseline) -> Document:
        gate = self.gate
        theirs = mean_score(baseline.runs, gate)
        if theirs is None:
            raise InputError(
                f"compare.gate.baseline: {baseline.told} was never scored by {gate.metric} on {gate.dataset}; "
                "evaluate it there, or name another"
            )
        document: Document = {"student": name, "what": "baseline", "baseline": baseline.told, "value": value}
        document["limit"] = theirs + gate.tolerance * _worse_is(gate.metric)
        if {run.run_id for run in group} == {run.run_id for run in baseline.runs}:
            sentence = f"{name} is {'the baseline' if name == baseline.told else baseline.told} itself."
            return document | {"difference": 0.0, "low": 0.0, "high": 0.0, "passed": True, "sentence": sentence}
        pair = None
        if gate.metric in _PER_SAMPLE:
            pair = paired(self.runs, group, baseline.runs, gate.dataset, self.resamplings, gate.metric, gate.confidence)
        if pair is None:
            return document | self._without_samples(name, value - theirs, baseline)
        return document | self._by_samples(name, pair, baseline, same_truth([*group, *baseline.runs], gate.dataset))

    def _by_samples(self, name: str, pair: Paired, baseline: Baseline, one_truth: bool) -> Document:
        gate, sign = self.gate, _worse_is(self.gate.metric)
        worse = sorted((sign * pair.interval.low, sign * pair.interval.high))
        mean = sign * pair.interval.mean
        verdict = "passes" if worse[1] <= gate.tolerance else "fails" if worse[0] > gate.tolerance else "doubt"
        in_doubt = mean <= gate.tolerance if gate.in_doubt == "mean" else gate.in_doubt == "passes"
        passed = in_doubt if verdict == "doubt" else verdict == "passes"
        sure = float(np.mean((sign * pair.means > gate.tolerance) != passed))
        return {
            "difference": pair.interval.mean,
            "low": pair.interval.low,
            "high": pair.interval.high,
            "samples": pair.interval.count,
            "seeds": None if pair.seeds is None else [pair.seeds.low, pair.seeds.high],
            "sure": sure,
            "verdict": verdict,
            "passed": passed,
            "sentence": _baseline_sentence(name, gate, baseline, pair, mean, verdict, passed, sure, one_truth),
        }

    def _without_samples(self, name: str, difference: float, baseline: Baseline) -> Document:
        gate, worse = self.gate, difference * _worse_is(self.gate.metric)
        passed = worse <= gate.tolerance
        sentence = (
            f"{name} is {_amount(gate, abs(worse))} {'worse' if worse > 0 else 'better'} than {baseline.told} on "
            f"{gate.dataset}: {'within' if passed else 'more than'} the {_amount(gate, gate.tolerance)} allowed. How "
            "sure that is cannot be said: there are no errors of the same samples in this metric."
        )
        return {"difference": difference, "low": None, "high": None, "passed": passed, "sentence": sentence}


def find_baseline(gate: GateConfig, runs: Runs, groups: Mapping[str, Group], first_of: str | None) -> Baseline | None:
    """Who `compare.gate.baseline` names; None where it names nobody, or a first winner that there is not yet.

    first_of: `models:/<name>@<alias>` that winners are given, and that has nobody before the first one.
    """
    if gate.baseline is None:
        return None
    if not gate.baseline.startswith(REGISTERED):
        if gate.baseline not in groups:
            known = ", ".join(sorted(groups))
            raise InputError(f"compare.gate.baseline: no scored student is named {gate.baseline!r}; known: {known}")
        return Baseline(gate.baseline, groups[gate.baseline])
    split_registered(gate.baseline)
    found = runs.registered(gate.baseline)
    if found is not None:
        return Baseline(gate.baseline, [found[0]], found[1])
    if gate.baseline == first_of:
        return None
    raise InputError(
        f"compare.gate.baseline: the model registry has no {gate.baseline}; register it, name another, or leave it out"
    )


def gate_document(judge: Judge, groups: Mapping[str, Group]) -> Document:
    """What `handstill compare --json` says of the gate."""
    gate = judge.gate
    nobody = gate.baseline is not None and judge.baseline is None
    first = [f"There is no {gate.baseline} yet: the first student that passes becomes it."] if nobody else []
    values = {name: mean_score(group, gate) for name, group in groups.items()}
    known = {name: value for name, value in values.items() if value is not None}
    missing = sorted(set(gate.students or []) - known.keys())
    if missing or not known:
        raise InputError(
            f"compare.gate: {', '.join(missing) or 'no student'} has no {gate.metric} on {gate.dataset}; "
            f"students that have: {', '.join(sorted(known)) or 'none'}"
        )
    ranked = sorted(known, key=lambda name: known[name] * _worse_is(gate.metric))
    judged = gate.students or ranked[:1]
    checks = [check for name in judged for check in judge.checks(name, groups[name])]
    passed = all(check["passed"] for check in checks)
    caveats = [caveat for name in judged if (caveat := judge.caveat(name, groups[name])) is not None]
    return {
        "passed": passed,
        "metric": gate.metric,
        "dataset": gate.dataset,
        "checks": checks,
        "caveats": caveats,
        "sentences": [*first, *(check["sentence"] for check in checks), *caveats],
        "winner": _winner(judge, [name for name in ranked if name in judged], groups) if passed else None,
    }


def _winner(judge: Judge, ranked: Sequence[str], groups: Mapping[str, Group]) -> Document | None:
    """The best seed of the best student that passes by itself: it is one model that goes to work, not a mean."""
    sign = _worse_is(judge.gate.metric)
    for name in ranked:
        scored = [(mean_score([run], judge.gate), run) for run in groups[name]]
        known = sorted(((value, run) for value, run in scored if value is not None), key=lambda each: sign * each[0])
        for value, run in known:
            which = f"{name} (seed {run.seed})"
            checks = judge.checks(which, [run])
            if all(check["passed"] for check in checks):
                caveat = judge.caveat(which, [run])
                return {
                    "student": name,
                    "seed": run.seed,
                    "run_id": run.run_id,
                    "identity": run.identity,
                    "value": value,
                    "sentences": [*(check["sentence"] for check in checks), *([caveat] if caveat else [])],
                }
    return None


def better(metric: str, a: float, b: float) -> bool:
    """Whether a is better than b: errors in mm are small, scores large."""
    return a < b if metric.endswith("_mm") else a > b


def best_value(metric: str, values: Sequence[float]) -> float:
    """The best of several values, of which there is one at least."""
    return min(values) if better(metric, 0, 1) else max(values)


def _worse_is(metric: str) -> int:
    """The sign of a difference for the worse."""
    return 1 if metric.endswith("_mm") else -1


def mean_score(group: Group, gate: GateConfig) -> float | None:
    """The mean over the seeds that were scored; None where none was."""
    values = [v for run in group if (v := run.metrics.get(gate.dataset, {}).get(gate.metric)) is not None]
    return float(np.mean(values)) if values else None


def _amount(gate: GateConfig, value: float) -> str:
    return f"{value:.3g} mm" if gate.metric.endswith("_mm") else f"{value:.3g}"


def _title(gate: GateConfig) -> str:
    return f"{METRIC_TITLES[gate.metric].removesuffix(', mm')} on {gate.dataset}"


def _limit_sentence(name: str, gate: GateConfig, value: float, what: str, limit: float, passed: bool) -> str:
    of = {"limit": "the limit", "teacher_ratio": f"{gate.teacher_ratio:g} times the teacher's" if gate.teacher_ratio
          else "", "better_than_mean_pose": "the mean pose"}[what]  # fmt: skip
    worse = (value - limit) * _worse_is(gate.metric)
    by = f"{_amount(gate, abs(worse))} {'worse' if worse > 0 else 'better'} than" if worse else "just"
    verdict = "passes" if passed else "fails"
    return f"{name} has {_amount(gate, value)} {_title(gate)}, {by} {of} ({_amount(gate, limit)}): {verdict}."


def _baseline_sentence(
    name: str,
    gate: GateConfig,
    baseline: Baseline,
    pair: Paired,
    worse: float,
    verdict: str,
    passed: bool,
    sure: float,
    one_truth: bool,
) -> str:
    """By how much, and how sure."""
    low, high = sorted((_worse_is(gate.metric) * pair.interval.low, _worse_is(gate.metric) * pair.interval.high))
    by = f"{_amount(gate, abs(worse))} {_direction(worse)} than {baseline.told} in {_title(gate)}"
    ends = " to ".join(f"{abs(end):.3g} {_direction(end)}" for end in (low, high))
    spread = f"{gate.confidence:.0%} interval: {ends}; {pair.interval.count} samples"
    allowed = f"{_amount(gate, gate.tolerance)} allowed"
    if verdict == "doubt":
        how = {"mean": "the mean decides", "fails": "doubt fails", "passes": "doubt passes"}[gate.in_doubt]
        end = f"{'passes' if passed else 'fails'} in doubt ({how}): {allowed}, {_share(sure)} sure"
    else:
        end = f"{'passes' if passed else 'fails'}: {allowed}, {_share(sure)} sure"
    other = (
        "" if one_truth else " The two were scored on different snapshots of the data set; only shared samples count."
    )
    return f"{name} is {by} ({spread}), and {end}.{other}"


def _direction(worse: float) -> str:
    return "worse" if worse > 0 else "better"


def _share(value: float) -> str:
    """Of resamplings; never quite 100%, which no number of resamplings shows."""
    return "over 99.9%" if value > 0.999 else f"{value:.1%}"
