"""What a parser may not do while it reads: start programs, open connections, write, take gigabytes, take minutes."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

LONGEST_S = 20.0
"""On a busy machine; a read of these small files takes milliseconds."""
MOST_MEMORY_BYTES = 3 << 30
"""Of address space beyond what the process has when it begins; a photograph of 2^27 pixels is decoded in 1.2 GB."""

_FORBIDDEN = (
    *(
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.fork",
        "os.forkpty",
        "os.startfile",
        "subprocess.Popen",
    ),
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod", "os.chown"),
    *(
        "shutil.rmtree",
        "shutil.move",
        "socket.connect",
        "socket.bind",
        "socket.getaddrinfo",
        "urllib.Request",
        "pty.spawn",
    ),
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class ForbiddenError(BaseException):
    """The parser did what it may not; no `except Exception` of its own hides that."""


class OverlongError(BaseException):
    """The parser took longer than LONGEST_S."""


_seen: list[str] | None = None
"""What was forbidden and happened since `guarded` began; None where nothing is guarded."""
_installed = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    writes = event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & _WRITING)
    if writes or event in _FORBIDDEN:
        _seen.append(f"{event} {str(arguments)[:200]}")
        raise ForbiddenError(_seen[-1])


def _ring(number: int, frame: FrameType | None) -> None:
    raise OverlongError(f"more than {LONGEST_S} s")


@contextmanager
def guarded() -> Iterator[None]:
    """Raises ForbiddenError, even where the parser swallowed it, or OverlongError."""
    global _seen, _installed
    if not _installed:
        sys.addaudithook(_audit)
        _installed = True
    before = signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
    started, happened = time.monotonic(), []
    _seen = happened
    try:
        yield
    finally:
        _seen = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if happened:
        raise ForbiddenError(happened[0])
    if time.monotonic() - started > LONGEST_S:
        raise OverlongError(f"{time.monotonic() - started:.0f} s")


def limit_memory() -> None:
    """From here on this process cannot take more than MOST_MEMORY_BYTES beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MOST_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def peak_bytes() -> int:
    """The most resident memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
