from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["trainer.config", "trainer.job", "trainer.metrics", "trainer.scores"])
def test_planning_and_scoring_need_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(any(m in sys.modules for m in ('torch', 'mlflow', 'timm', 'ray')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_training_evaluating_and_comparing_never_import_the_teacher_or_ray() -> None:
    modules = "trainer.loop, trainer.evaluate, trainer.compare, trainer.report"
    code = f"import sys, {modules}; sys.exit(any(m in sys.modules for m in ('models.teacher', 'ray')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
