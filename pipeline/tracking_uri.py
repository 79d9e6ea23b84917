"""Where MLflow is, in words that may be shown: an address with a password in it is refused."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from storage.errors import InputError

URI_VARIABLE = "MLFLOW_TRACKING_URI"


def without_password(uri: str) -> str:
    """A tracking URI that may be logged and stored. ValueError, which does not repeat it, where it may not."""
    try:
        password = urlsplit(uri).password
    except ValueError:  # no URL: MLflow says what it thinks of it
        password = None
    if password is None:
        return uri
    raise ValueError(
        "the address holds a password, which logs, records and job servers would show; take it out. A server's goes "
        "into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or ~/.mlflow/credentials, a database's into its "
        "client's own file (~/.pgpass)"
    )


def named_in_environment() -> str | None:
    """What MLFLOW_TRACKING_URI says; None where it is not set. InputError where it holds a password."""
    return checked(os.environ.get(URI_VARIABLE) or None, URI_VARIABLE)


def checked(uri: str | None, where: str) -> str | None:
    """The same address. InputError, which begins with `where`, if it holds a password."""
    try:
        return None if uri is None else without_password(uri)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
