"""The finished experiment of the pipeline's tests, for commands to run on."""

from __future__ import annotations

from tests.pipeline.conftest import (  # noqa: F401
    _logging_as_it_was,
    _no_server_of_the_environment,
    finished,
    inline_workers,
    lab,
)
