"""Our metrics against what the official FreiHAND and HO-3D scripts printed for the same inputs."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import numpy as np
import pytest

from tests.shared import REFERENCE, needs_shared
from trainer import metrics as m

CM_PER_MM = 0.1


def official_inputs(case: dict[str, Any]) -> tuple[np.ndarray, ...]:
    spec = importlib.util.spec_from_file_location("evaluator_cases", REFERENCE / "evaluator_cases.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return tuple(module.cases(case["seed"], case["n"], case["noise"], case["kind"]))


def our_scores(xyz: np.ndarray, verts: np.ndarray, pred_xyz: np.ndarray, pred_verts: np.ndarray) -> dict[str, float]:
    aligned_xyz, aligned_verts = m.align(pred_xyz, xyz), m.align(pred_verts, verts)
    scaled_xyz = m.align_scale_translation(pred_xyz, xyz)
    raw_5, raw_15 = m.f_scores(pred_verts, verts, (0.005, 0.015)).mean(0)
    al_5, al_15 = m.f_scores(aligned_verts, verts, (0.005, 0.015)).mean(0)
    return {
        "xyz_mean3d": m.mpjpe_mm(pred_xyz, xyz).mean() * CM_PER_MM,
        "xyz_auc3d": m.auc(pred_xyz, xyz),
        "xyz_al_mean3d": m.pa_mpjpe_mm(pred_xyz, xyz).mean() * CM_PER_MM,
        "xyz_al_auc3d": m.auc(aligned_xyz, xyz),
        "xyz_procrustes_al_mean3d": m.pa_mpjpe_mm(pred_xyz, xyz).mean() * CM_PER_MM,
        "xyz_procrustes_al_auc3d": m.auc(aligned_xyz, xyz),
        "xyz_scale_trans_al_mean3d": m.mpjpe_mm(scaled_xyz, xyz).mean() * CM_PER_MM,
        "xyz_scale_trans_al_auc3d": m.auc(scaled_xyz, xyz),
        "mesh_mean3d": m.mpjpe_mm(pred_verts, verts).mean() * CM_PER_MM,
        "mesh_auc3d": m.auc(pred_verts, verts),
        "mesh_al_mean3d": m.pa_mpvpe_mm(pred_verts, verts).mean() * CM_PER_MM,
        "mesh_al_auc3d": m.auc(aligned_verts, verts),
        "f_score_5": raw_5,
        "f_al_score_5": al_5,
        "f_score_15": raw_15,
        "f_al_score_15": al_15,
    }


@needs_shared
def test_every_number_the_official_evaluators_print() -> None:
    compared = 0
    for case in json.loads((REFERENCE / "evaluator_scores.json").read_text()):
        ours = our_scores(*official_inputs(case))
        for benchmark in ("freihand", "ho3d"):
            for name, official in case[benchmark].items():
                assert ours[name] == pytest.approx(official, abs=1e-6), (case["seed"], case["kind"], benchmark, name)
                compared += 1
    assert compared >= 100
