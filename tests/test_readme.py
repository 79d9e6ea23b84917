"""The README's layout says of every module what the module says of itself. Rewrite it: python tests/test_readme.py"""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

from pipeline.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- layout:[^\n]*-->\n).*?(<!-- /layout -->)", re.DOTALL)


def layout() -> str:
    """A list of packages, each with its modules, in the order of imports."""
    lines = []
    for package in ("pipeline", "stages", "trainer", "models", "storage", "benchmarks"):
        lines += ["```", f"{package}/"]
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


if __name__ == "__main__":
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    readme.write_text(BLOCK.sub(lambda m: m.group(1) + layout() + m.group(2), old), encoding="utf-8")
