"""Telling somebody how a run ended: a command that gets the summary on stdin, a webhook that gets it as a POST.

Neither changes how the run ended: what goes wrong here is a line in the log. A webhook's address is a secret (whoever
has it may post), so that it is never written anywhere: messages name its host.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http.client import HTTPException
from typing import Any

from pipeline.config import NotifyConfig

log = logging.getLogger("handstill")

URL_VARIABLE = "HANDSTILL_NOTIFY_URL"
"""In the environment: wins over `notify.url`, for those who keep secrets out of files."""


def notify(config: NotifyConfig, document: Mapping[str, Any]) -> None:
    """Tell whoever wants to know of such an outcome; never raises for what they do."""
    ending = "busy" if (document.get("failure") or {}).get("kind") == "busy" else document["outcome"]
    if ending not in config.on:
        return
    data = json.dumps(document).encode()
    if config.command:
        _tell_command(config.command, data, config.timeout_s)
    url = os.environ.get(URL_VARIABLE) or (None if config.url is None else config.url.get_secret_value())
    if url:
        _tell_webhook(url, data, config.timeout_s)


def _tell_command(command: Sequence[str], data: bytes, timeout_s: float) -> None:
    """Run it without a shell; what it prints on stdout goes nowhere, because stdout is for our own document."""
    try:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        ) as process:
            try:
                process.communicate(data, timeout_s)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with whatever it started
                log.warning("notify.command: %s was stopped after %g s", command[0], timeout_s)
                return
    except OSError as error:
        log.warning("notify.command: %s: %s", command[0], error.strerror or error)
        return
    if process.returncode:
        log.warning("notify.command: %s ended with exit code %d", command[0], process.returncode)


def _tell_webhook(url: str, data: bytes, timeout_s: float) -> None:
    host = "the webhook"
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https"):
            log.warning("notify.url: not an http:// or https:// address")
            return
        host = parts.hostname or host
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method="POST")
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=timeout_s):
            return
    except urllib.error.HTTPError as error:
        error.close()
        why = f"answered {error.code}"
    except urllib.error.URLError as error:
        why = f"cannot be reached: {type(error.reason).__name__}"  # some reasons quote the address
    except (OSError, HTTPException, ValueError) as error:
        why = f"cannot be reached: {type(error).__name__}"
    log.warning("notify.url: %s %s", host, why)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST would be sent as a GET, without the document, perhaps somewhere else."""

    def redirect_request(self, *_: Any) -> None:
        return None
