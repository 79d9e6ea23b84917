"""What a pipeline file refers to now: the manifests, shards, snapshots, students and scores that its plan names."""

from __future__ import annotations

from dataclasses import asdict

from pipeline.caches import cache_state
from pipeline.calibrations import calibration_folder
from pipeline.evaluating import EvaluationState, evaluation_states
from pipeline.experiment import Experiment
from pipeline.manifests import sources_of
from pipeline.references import Reference, own_reference, reference_name
from pipeline.training import StudentState, student_states
from storage.config import is_fitted
from storage.durable import sealed_json, write_bytes_atomic


def refer(experiment: Experiment) -> None:
    """Write down what this pipeline file refers to; nothing where that stands already."""
    data = sealed_json(asdict(current_reference(experiment)))
    for folder in {experiment.workdir.references, experiment.cache_references}:
        path = folder / reference_name(experiment)
        if not path.is_file() or path.read_bytes() != data:
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes_atomic(path, data)


def current_reference(experiment: Experiment) -> Reference:
    """What it refers to as things are now.

    Where the identity of an output is not known yet, what was referred to at the last run stays.
    """
    states = [cache_state(experiment, "train"), cache_state(experiment, "evaluate")]
    units: list[StudentState | EvaluationState] = [*student_states(experiment, states[0])]
    units += evaluation_states(experiment)
    root = experiment.workdir.root
    outputs = {unit.folder for unit in units if unit.identity is not None}
    outputs |= {path for state in states for shards in state.datasets.values() for path in shards.manifests}
    named = {str(path.relative_to(root)) for path in outputs}
    before = own_reference(experiment)
    if before is not None and any(unit.identity is None for unit in units):
        named |= set(before.outputs)
    used = {name: config for _, name, config in experiment.datasets_by_role()}
    sources = [source for name, config in used.items() for source in sources_of(experiment, name, config)]
    return Reference(
        config=str(experiment.file),
        workdir=experiment.workdir.place,
        sources=sorted(source.place for source in sources),
        outputs=sorted(named),
        calibrations=sorted(
            {
                calibration_folder(experiment, state.identity).name
                for state in states
                if is_fitted(state.settings.features.encoding)
            }
        ),
        shards={
            state.fingerprint: sorted({plan.input_hash for shards in state.datasets.values() for plan in shards.plans})
            for state in states
        },
        snapshots={
            state.fingerprint: {name: digest for name, digest in state.digests.items() if digest is not None}
            for state in states
        },
    )
