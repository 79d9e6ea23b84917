"""`handstill submit`: the same run as a Ray job. Code and configuration travel, dependencies are in the nodes' image.

The job server (Ray's dashboard) packs no secrets: credentials come from the nodes' own environment. With Ray's token
authentication the client takes the token where Ray does: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import PipelineConfig
from pipeline.job_code import JOB_BASE, JOB_CODE, JOB_FILE, JOB_NAME, PACKAGES, ROOT, code_digest
from pipeline.logs import in_json, write_line
from pipeline.provenance import JOB_PROVENANCE, provenance_tags
from pipeline.tracking_uri import URI_VARIABLE, named_in_environment
from storage.errors import InputError, WorkError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

log = logging.getLogger("handstill")

PACKED_CONFIG = "pipeline.yaml"
DEFAULT_JOB_SERVER = "http://127.0.0.1:8265"
"""Where Ray's dashboard listens unless told otherwise."""
PATIENCE_S = 300.0
"""How long a job server may be away while its job is followed: a head that restarts is back by then."""
LOOK_EVERY_S = 2.0
AGENT_PATIENCE_S = 120.0
"""How long a head may take until its agent can start jobs; on an idle machine it is seconds after the dashboard."""
STOPPED_EXIT_CODE = 143
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""How long Ray's job supervisor waits between SIGTERM and SIGKILL."""
STOP_MARGIN_S = 15
"""Beyond `cluster.stop_within_s`: what is left is put down, the summary written, Ray left."""


def submit(config: PipelineConfig, config_path: Path, command: Sequence[str]) -> str:
    """Hand `handstill <command>` to the cluster; the job's id. config: what stands in the file at config_path.

    Raises:
        WorkError: the job server cannot be used.
    """
    client = job_client(config)
    name = f"handstill-{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    with _packed(config_path) as folder:
        job = _handed_over(
            client,
            entrypoint=shlex.join([config.cluster.job_python, "-m", "pipeline.cli", *command, "-c", PACKED_CONFIG]),
            submission_id=name,
            runtime_env={"working_dir": str(folder), "env_vars": _environment(config, config_path, name)},
            metadata={"handstill": config.name, "command": " ".join(command)},
        )
    log.info("submitted job %s to %s; relative paths start at %s there", job, address_of(config), _base(config_path))
    return job


def _handed_over(client: JobSubmissionClient, **job: Any) -> str:
    """Submit; a head that has only just started, or is busy, is asked again for a while."""
    give_up = time.monotonic() + AGENT_PATIENCE_S
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            why = str(error).strip().splitlines()[0]
            if "No available agent" not in why or time.monotonic() > give_up:
                raise WorkError(f"submit: the job server did not take the job: {why}") from error
        log.info("the cluster is not ready to take the job yet, asking again")
        time.sleep(LOOK_EVERY_S)


def follow(config: PipelineConfig, job: str, write: Callable[[str], object] | None = None) -> dict[str, Any]:
    """Pass the job's log on until it ends: {ok, job, status, exit_code, message}. Its exit code is the run's own.

    A job server that goes away is waited for, `PATIENCE_S` at most; the log goes on where it was.

    Raises:
        InputError: there is no such job.
        WorkError: the job server stayed away; the job may go on without it.
    """
    client = job_client(config)
    details = _details(client, job)
    to_stderr = _ToStderr()
    try:
        asyncio.run(_pass_on(client, job, write or to_stderr))
    finally:
        to_stderr.end()
    details = _details(client, job)
    code = _exit_code(details)
    return {
        "ok": code == 0,
        "job": job,
        "status": str(details.status.value),
        "exit_code": code,
        "message": details.message,
    }


def stop(config: PipelineConfig, job: str) -> bool:
    """Ask the job to end, as SIGTERM does: what is finished is kept. False: it had ended already.

    Raises:
        InputError: there is no such job.
    """
    client = job_client(config)
    _details(client, job)
    return bool(client.stop_job(job))


def address_of(config: PipelineConfig) -> str:
    """The configured job server, else the environment's, else the one on this machine."""
    return config.cluster.jobs or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_JOB_SERVER


def job_client(config: PipelineConfig) -> JobSubmissionClient:
    """A connected client. Raises WorkError."""
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules").setLevel(logging.ERROR)  # says that a connection it closed is closed
    address = address_of(config)
    try:
        return JobSubmissionClient(address)
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise WorkError(
            f"cluster.jobs: cannot use the Ray job server at {address}: {why} It is the head's dashboard; a cluster "
            "with token authentication wants RAY_AUTH_MODE=token, and the token in RAY_AUTH_TOKEN or in a file that "
            "RAY_AUTH_TOKEN_PATH names."
        ) from None


def _details(client: JobSubmissionClient, job: str) -> JobDetails:
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        known = ", ".join(str(other.submission_id) for other in client.list_jobs()) or "none"
        raise InputError(f"submit: the job server knows no job {job!r}; its jobs: {known}") from error


def _exit_code(details: JobDetails) -> int:
    from ray.job_submission import JobStatus

    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return STOPPED_EXIT_CODE
    return details.driver_exit_code or 1


async def _pass_on(client: JobSubmissionClient, job: str, write: Callable[[str], object]) -> None:
    """Write the log as it grows, once, until the job has ended."""
    from aiohttp import ClientError

    written, last_seen = 0, time.monotonic()
    while True:
        try:
            read = 0
            async for text in client.tail_job_logs(job):
                fresh = text[max(0, written - read) :]
                read += len(text)
                written = max(written, read)
                last_seen = time.monotonic()
                if fresh:
                    write(fresh)
            if client.get_job_status(job).is_terminal():
                return
        except (RuntimeError, ConnectionError, ClientError, OSError) as error:
            if time.monotonic() - last_seen > PATIENCE_S:
                raise WorkError(
                    f"submit: lost the job server ({error}); the job may go on. Follow it again: "
                    f"handstill submit --follow {job}"
                ) from None
        await asyncio.sleep(LOOK_EVERY_S)


class _ToStderr:
    """A job's log as it comes; where JSON lines are wanted, whatever else Ray says between them as JSON too."""

    def __init__(self) -> None:
        self._rest = ""

    def __call__(self, text: str) -> None:
        if not in_json():
            sys.stderr.write(text)
            sys.stderr.flush()
            return
        *lines, self._rest = (self._rest + text).split("\n")
        for line in filter(None, lines):
            self._line(line)

    def end(self) -> None:
        """The last line, if nothing ended it."""
        if self._rest:
            self._line(self._rest)
        self._rest = ""

    def _line(self, line: str) -> None:
        try:
            ours = isinstance(json.loads(line), dict)
        except ValueError:
            ours = False
        if ours:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
        else:
            write_line(line, logger="ray.job")


def _environment(config: PipelineConfig, config_path: Path, name: str) -> dict[str, str]:
    found = {JOB_BASE: str(_base(config_path)), JOB_CODE: code_digest(), JOB_PROVENANCE: json.dumps(provenance_tags())}
    found |= {JOB_NAME: name, JOB_FILE: str(config_path.absolute())}
    # Ray's own three seconds would kill a driver that finishes its shards and writes its summary.
    found[STOP_WAIT] = str(math.ceil(config.cluster.stop_within_s) + STOP_MARGIN_S)
    if uri := named_in_environment():
        found[URI_VARIABLE] = uri
    return found


def _base(config_path: Path) -> Path:
    return config_path.absolute().parent


@contextmanager
def _packed(config_path: Path) -> Iterator[Path]:
    """A folder with our packages, their assets, and the configuration."""
    with tempfile.TemporaryDirectory(prefix="handstill-job-") as name:
        folder = Path(name)
        for package in PACKAGES:
            shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(config_path, folder / PACKED_CONFIG)
        yield folder
