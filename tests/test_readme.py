"""The README's layout says of every module what the module says of itself. Rewrite it: python tests/test_readme.py"""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- layout:[^\n]*-->\n).*?(<!-- /layout -->)", re.DOTALL)


def layout() -> str:
    """A list of packages, each with its modules, in the order of imports."""
    lines = []
    for package in ("pipeline", "stages", "trainer", "models", "storage", "benchmarks"):
        lines += ["```text", f"{package}/"]
        for module in sorted((ROOT / package).glob("*.py")):
            docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))
            assert docstring, f"{module} has no docstring"
            if module.name != "__init__.py":
                lines.append(f"  {module.name:<18} {docstring.splitlines()[0]}")
        lines += ["```", ""]
    return "\n".join(lines)


def test_layout_is_current() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = BLOCK.search(text)
    assert found is not None
    assert found.group(0) == found.group(1) + layout() + found.group(2), "run: python tests/test_readme.py"


def test_every_verb_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (verbs,) = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    names = set(verbs.choices)
    assert names >= {"check", "run", "compare"}
    assert {name for name in names if f"handstill {name}" not in text} == set()


def test_the_lines_that_predict_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(from pipeline\.predicting import.*?)```", text, re.DOTALL)
    assert len(lines.split("\n\n", 1)[1].strip().splitlines()) == 3, "four with the import"
    Image.fromarray(np.full((300, 400, 3), 90, np.uint8)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(ROOT)
    exec(lines.replace('"photo.jpg"', repr(str(tmp_path / "photo.jpg"))), {})
    assert "(21, 3) (21, 2) (1609, 3)" in capsys.readouterr().out


if __name__ == "__main__":
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    readme.write_text(BLOCK.sub(lambda m: m.group(1) + layout() + m.group(2), old), encoding="utf-8")
