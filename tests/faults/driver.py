"""The command line as a process that tests may disturb: wait for what it does, stop its workers, kill any of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOOK_EVERY_S = 0.002
PATIENCE_S = 240.0
"""Far more than any step takes, also on a busy machine: a test that waits that long has failed."""
STANDING, GONE = ("T", "t"), ("", "Z", "X")
"""Letters of `state_of`."""


@dataclass
class Driver:
    """One `handstill ...` in a process group of its own. Use as a context manager, which leaves nothing behind."""

    config: Path
    arguments: tuple[str, ...] = ("run",)
    environment: Mapping[str, str] = field(default_factory=dict)
    """Beside this process's own."""
    seen: int = 0
    """Lines of the event log that `wait_for` has gone past."""
    process: subprocess.Popen[bytes] = field(init=False)

    def __enter__(self) -> Driver:
        environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
        self.seen = len(self.events())
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.cli", "-c", str(self.config), *self.arguments],
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=environment | {"OMP_NUM_THREADS": "1"} | dict(self.environment),
                start_new_session=True,
                # a shell's background jobs, tests among them, hand down that SIGINT is to be ignored
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            for pid in [*workers_of(self.process.pid), self.process.pid]:
                send(pid, signal.SIGKILL)
            self.process.wait()

    @property
    def errors(self) -> Path:
        return self.config.with_suffix(".stderr")

    @property
    def said(self) -> str:
        """What it has written for people so far."""
        return self.errors.read_text()

    def events(self) -> list[dict[str, Any]]:
        """The whole event log of its workdir."""
        return read_events(self.config)

    def wait_for(self, event: str, **fields: Any) -> dict[str, Any]:
        """The next event of that name and those fields; it comes after all that was waited for before."""

        def look() -> dict[str, Any] | None:
            events = self.events()
            for at in range(self.seen, len(events)):
                if events[at]["event"] == event and fields.items() <= events[at].items():
                    self.seen = at + 1
                    return events[at]
            return None

        return self.wait_until(look, f"{event} {fields}")

    def wait_until(self, look: Callable[[], Any], what: str) -> Any:
        """What `look` finds, as soon as it finds something."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := look()):
            assert self.process.poll() is None, f"ended before {what}:\n{self.said}"
            assert time.monotonic() < deadline, f"waited in vain for {what}:\n{self.said}"
            time.sleep(LOOK_EVERY_S)
        return found

    def finish(self) -> int:
        """Wait for its end; the exit code."""
        return self.process.wait(PATIENCE_S)

    def kill(self) -> list[int]:
        """SIGKILL the driver, and nothing but the driver; the workers that it leaves behind."""
        orphans = workers_of(self.process.pid)
        self.process.kill()
        self.process.wait()
        return orphans

    def signal(self, number: signal.Signals) -> tuple[int, float]:
        """Send a signal to the driver; its exit code, and after how many seconds it ended."""
        started = time.monotonic()
        self.process.send_signal(number)
        return self.finish(), time.monotonic() - started

    def freeze_inside_a_shard(self) -> dict[str, Any]:
        """Stop the teacher while a shard is partly written; an event of that shard, with the teacher's pid."""
        while True:
            event = self.wait_for("teach_batch")
            if not stop(event["pid"]):
                continue  # a last word of a teacher that was killed since
            done = {other["unit"] for other in self.events() if other["event"] in ("shard_committed", "shard_adopted")}
            published = list(self.config.parent.rglob(f"{event['unit']}.zarr"))
            if event["unit"] not in done and not any(is_of(path, self.config) for path in published):
                return event
            send(event["pid"], signal.SIGCONT)


def run(config: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """A command from start to end: its exit code and what it said."""
    with Driver(config, arguments or ("run",), environment or {}) as driver:
        return driver.finish(), driver.said


def send(pid: int, number: signal.Signals) -> None:
    """A signal to a process that may be gone already."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def stop(pid: int) -> bool:
    """Stop a process and wait until it stands still; False: it is gone."""
    send(pid, signal.SIGSTOP)
    while (state := state_of(pid)) not in (*STANDING, *GONE):
        time.sleep(LOOK_EVERY_S)
    return state in STANDING


def workers_of(driver: int, title: str = "") -> list[int]:
    """Ray's worker processes below a driver, of those whose title has `title` in it, e.g. ray::prepared_batches."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            titles[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [
        pid
        for pid in sorted(parents)
        if titles[pid].startswith("ray::")
        and "Agent" not in titles[pid]  # Ray's own, not workers
        and title in titles[pid]
        and driver in _ancestors(pid, parents)
    ]


def _ancestors(pid: int, parents: dict[int, int]) -> Iterator[int]:
    while pid := parents.get(pid, 0):
        yield pid


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    return state_of(pid) not in GONE


def state_of(pid: int) -> str:
    """A process's state as /proc/PID/stat has it, one letter; "" where there is no such process."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_worker(pid: int) -> bool:
    """Whether a process runs and is one of Ray's workers (the number may be another process's by now)."""
    try:
        return alive(pid) and (Path("/proc") / str(pid) / "cmdline").read_bytes().startswith(b"ray::")
    except (FileNotFoundError, ProcessLookupError):
        return False


def sick(*sicknesses: Mapping[str, Any]) -> dict[str, str]:
    """The environment in which a run's processes fall ill; see sick/sitecustomize.py."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here / "sick"), str(here.parents[1])])
    return {"PYTHONPATH": path, "SICKNESS": json.dumps(sicknesses)}


class LateWorker:
    """A process that holds the claim of the run at work as its workers do, and does not end when they would."""

    def __init__(self, config: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LATE_WORKER, str(workdir_of(config))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"holding\n"

    def end(self) -> None:
        self._process.communicate(b"end")


_LATE_WORKER = """
import sys
from pathlib import Path
from pipeline.workdir import Workdir, claim_of

with claim_of(Workdir(Path(sys.argv[1]))).held():
    print("holding", flush=True)
    sys.stdin.read()
"""


def workdir_of(config: Path) -> Path:
    """Each configuration `<name>.yaml` of these tests works in the folder `<name>` beside it."""
    return config.with_suffix("")


def is_of(path: Path, config: Path) -> bool:
    return path.is_relative_to(workdir_of(config))


def read_events(config: Path) -> list[dict[str, Any]]:
    """The complete lines of a workdir's event log."""
    path = workdir_of(config) / "logs" / "events.jsonl"
    if not path.exists():
        return []
    data = path.read_bytes()
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
