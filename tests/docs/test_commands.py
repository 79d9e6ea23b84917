"""Every shell command of README and docs: run on a tiny experiment, or parsed, with the reason why it is not run.

Beside blocks of shell, commands within the text (`handstill ...`, `python benchmarks/...`, `make ...`) must parse.
"""

from __future__ import annotations

import re
import shlex
from argparse import _SubParsersAction
from pathlib import Path

import pytest

from pipeline.cli import build_parser
from tests.docs.pages import PAGES, ROOT, blocks
from tests.pipeline.commands import handstill
from tests.pipeline.lab import Lab

HELD_BACK = {
    "make demo": "minutes: CI runs it",
    "make test": "these very tests",
    "handstill submit": "needs a job server: tests/pipeline/test_submit.py runs these",
    "handstill -c my.yaml check": "needs licensed files: test_check_says_what_is_missing runs it without them",
    "handstill compare --tracking-uri": "needs a tracking server: tests of comparisons run it on a folder of runs",
    "handstill audit --on local": "tests/pipeline/test_auditing.py runs it",
    "python benchmarks/cache_reading.py": "seconds to minutes, alone: `make bench` runs it",
    "python benchmarks/latency.py": "seconds to minutes, alone: `make bench` runs it",
    "python -m tests.fuzz.run": "tests/fuzz/test_fuzz.py runs it",
    "cp docs/hamer.yaml my.yaml": "test_check_says_what_is_missing does it",
}
"""How a command begins, and why it is not run here. It is parsed all the same."""
PLACEHOLDERS = re.compile(r"<[^>]+>|\.\.\.|…|\bNAME\|FOLDER\b")


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line in a block of shell, without its comment."""
    lines = [(block.page, line) for block in blocks("sh") for line in block.text.replace("\\\n", " ").splitlines()]
    stripped = [(page, re.sub(r"\s+#.*", "", line).strip()) for page, line in lines]
    return [(page, line) for page, line in stripped if line and not line.startswith("#")]


def spoken() -> list[tuple[str, str]]:
    """Commands within the text, whole ones: with a verb, and without a placeholder."""
    texts = {page: re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.S | re.M) for page in PAGES}
    found = [(page, command) for page, text in texts.items() for command in re.findall(r"`([^`\n]+)`", text)]
    ours = ("handstill ", "python benchmarks/", "python -m ", "make ")
    return [(page, line) for page, line in found if line.startswith(ours) and not PLACEHOLDERS.search(line)]


def held_back(command: str) -> bool:
    return any(command.startswith(begin) for begin in HELD_BACK)


def check_that_it_parses(command: str) -> None:
    program, *arguments = shlex.split(command)
    if program == "handstill":
        build_parser().parse_args(arguments)  # a mistake ends in SystemExit
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), flags=re.M)
    elif program == "python":
        module = arguments[1].replace(".", "/") + ".py" if arguments[0] == "-m" else arguments[0]
        source = (ROOT / module).read_text()
        beside = [(ROOT / module).with_name(f"{name}.py") for name in re.findall(r"^from (\w+) import", source, re.M)]
        source += "".join(path.read_text() for path in beside if path.is_file())  # scripts share their options
        assert all(f'"{option}"' in source for option in arguments if option.startswith("--"))
    elif program == "cp":
        assert (ROOT / arguments[0]).is_file()
    else:
        pytest.fail(f"{command}: say in this test how {program} is checked")


@pytest.mark.parametrize(("page", "command"), [pair for pair in commands() if held_back(pair[1])])
def test_a_command_that_is_held_back_parses(page: str, command: str) -> None:
    check_that_it_parses(command)


@pytest.mark.parametrize(("page", "command"), sorted(set(spoken())))
def test_a_command_in_the_text_parses(page: str, command: str) -> None:
    if command.split()[0] != "handstill" or len(command.split()) > 2:
        check_that_it_parses(command)
    else:  # `handstill verify`: a verb by its name, whatever else it wants
        assert command.split()[1] in verbs()


def verbs() -> set[str]:
    (choices,) = (action.choices for action in build_parser()._actions if isinstance(action, _SubParsersAction))
    return set(choices)


def test_no_reason_is_left_over() -> None:
    assert all(any(command.startswith(begin) for _, command in commands()) for begin in HELD_BACK)


def test_every_block_says_what_it_is() -> None:
    """Else a block of commands could stand where nothing looks at it."""
    assert {block.language for block in blocks()} <= {"sh", "text", "toml", "yaml", "python"}
    begins = re.compile(r"^(\$|handstill|make|python|pip|ray|kubectl|mlflow)\s")
    hidden = [b for b in blocks("text") if begins.match(b.text) and b.name not in ("verbs", "missing")]
    assert [f"{block.page}: {block.text[:60]}" for block in hidden if not block.text.startswith("handstill:")] == []


def test_no_page_has_a_merge_left_open() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "models").rglob("*.md")]
    assert len(pages) > 20
    assert not [page for page in pages if re.search(r"^(<{7}|={7}|>{7})( |$)", page.read_text(), re.MULTILINE)]


def test_the_list_of_verbs_is_that_of_the_command_line() -> None:
    (listed,) = blocks("text", "README.md", "verbs")
    assert set(re.findall(r"^handstill (\w+)", listed.text, flags=re.M)) == verbs()


@pytest.mark.parametrize("page", sorted({page for page, command in commands() if not held_back(command)}))
def test_the_commands_of_a_page_run(lab: Lab, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, in the experiment's folder, as a reader would."""
    monkeypatch.chdir(lab.folder)
    for _, command in [pair for pair in commands() if pair[0] == page and not held_back(pair[1])]:
        program, *arguments = shlex.split(command)
        assert program == "handstill", f"{page}: {command}: say in this test how it is run, or why not"
        answer = handstill(*arguments)
        assert answer.code == 0, f"{page}: {command}: {answer.err}"


def test_check_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_bytes((ROOT / "docs/hamer.yaml").read_bytes())
    answer = handstill("-c", tmp_path / "my.yaml", "check")
    (wanted,) = blocks("text", "docs/bring-your-own.md", "missing")
    assert answer.code == 2
    for line in wanted.text.splitlines():
        assert line in answer.err


def test_the_plans_are_plans_own(lab: Lab) -> None:
    """docs/regenerating.md: each change, and what `plan` says of it."""
    import yaml

    page = "docs/regenerating.md"
    changes, plans = blocks("yaml", page, "change"), blocks("text", page, "plan")
    assert len(changes) == len(plans) > 2
    before = lab.config.read_text()
    for change, plan in zip(changes, plans, strict=True):
        lab.configure(yaml.safe_load(change.text))
        said = handstill("plan", "-c", lab.config).out
        for line in plan.text.splitlines():
            assert line in said, f"{change.text}{said}"
        lab.config.write_text(before)
