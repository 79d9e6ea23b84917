"""Commands as a person gives them, run in this process, with what they printed and how they ended."""

from __future__ import annotations

import contextlib
import io
import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cli import main


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)


def handstill(*arguments: str | Path) -> Answer:
    """Run a command line."""
    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse: --help and mistakes in the command line
            code = int(stop.code or 0)
        finally:
            signal.signal(signal.SIGTERM, handler)
    return Answer(code, out.getvalue(), err.getvalue())


def as_json(config: Path, *arguments: str | Path) -> Any:
    """The document of a command that must succeed."""
    answer = handstill(*arguments, "-c", config, "--json")
    assert answer.code == 0, answer.err
    return answer.document
