"""An MLflow store as the pipeline leaves it, without training anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from trainer.cases import write_table


class Store:
    """An MLflow store as the pipeline leaves it."""

    def __init__(self, folder: Path) -> None:
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.folder = folder
        self.client = MlflowClient(tracking_uri=self.uri)
        self.experiments: dict[str, str] = {}

    def add(
        self,
        tags: dict[str, str],
        metrics: dict[str, float],
        params: dict[str, Any],
        status: str = "FINISHED",
        experiment: str = "exp",
    ) -> str:
        if experiment not in self.experiments:
            place = (self.folder / "artifacts").as_uri()
            self.experiments[experiment] = self.client.create_experiment(experiment, artifact_location=place)
        run_id: str = self.client.create_run(
            self.experiments[experiment],
            run_name=tags.get("student", "teacher"),
            tags={f"handstill.{key}": value for key, value in tags.items()},
        ).info.run_id
        self.client.log_batch(run_id, metrics=[Metric(key, value, 0, 0) for key, value in metrics.items()])
        for key, value in params.items():
            self.client.log_param(run_id, key, value)
        self.client.set_terminated(run_id, status)
        return run_id

    def add_samples(self, run_id: str, dataset: str, errors: np.ndarray, **more: np.ndarray) -> None:
        ids = np.array([f"s{i:03d}" for i in range(len(errors))], object)
        path = self.folder / "samples.parquet"
        write_table(path, {"sample_id": ids, "pa_mpjpe_mm": errors, "f5": errors, **more})
        self.client.log_artifact(run_id, str(path), f"evaluation/{dataset}")


def student(store: Store, name: str, seed: int, error: float, errors: np.ndarray | None = None, **more: Any) -> str:
    """errors: of each sample; None: 40 of them about `error`."""
    tags = {
        "kind": "student", "student": name, "seed": str(seed), "strategy": name.split("-")[1],
        "backbone": name.split("-")[0], "identity": f"{name}{seed}",
    }  # fmt: skip
    metrics = {"val/pa_mpjpe_mm": error, "val/f5": 0.5, "latency_ms/1": 20.0, "fps": 50.0, "params_m": 4.0}
    params = {"head": "light", "steps": 20, **more.pop("params", {})}
    run_id = store.add(tags, metrics | {"loss": 1.0, "label/betas": 2.0}, params, **more)
    for step in (10, 20):
        store.client.log_metric(run_id, "validation/pa_mpjpe_mm", error + 20 - step, step=step)
    store.add_samples(run_id, "val", error + np.linspace(-1, 1, 40) if errors is None else errors)
    return run_id
