"""Where MLflow is, in words that may be shown: an address with a password in it is refused."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from storage.errors import InputError

URI_VARIABLE = "MLFLOW_TRACKING_URI"
_ELSEWHERE = ("http", "https", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc")
"""Kinds of stores that answer for themselves; a database's may name its driver, as in mysql+pymysql."""


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


def existing(uri: str, where: str) -> str:
    """The same address, of a store to read. InputError, which begins with `where`, if it is of no kind that MLflow has,
    or a local one that is not there: MLflow would make an empty one and say that it knows no experiment."""
    kind, separator, rest = uri.partition(":")
    if kind.partition("+")[0] in _ELSEWHERE:
        place: Path | None = None
    elif kind == "sqlite" and separator:
        place = Path(rest.partition("?")[0].removeprefix("///"))
    elif kind == "file" and separator:
        place = path_of_uri(uri)
    elif not separator or Path(uri).exists():
        place = Path(uri)
    else:
        raise InputError(
            f"{where}: found {uri}, want an address of MLflow: http://..., sqlite:///FILE, postgresql://..."
        )
    if place is not None and not place.exists():
        raise InputError(f"{where}: {place} is not there; want the store that runs were written to")
    return uri


def path_of_uri(uri: str) -> Path:
    """The place that file://... names."""
    return Path(unquote(urlsplit(uri).path))


def named_in_environment() -> str | None:
    """What MLFLOW_TRACKING_URI says; None where it is not set. InputError where it holds a password."""
    return checked(os.environ.get(URI_VARIABLE) or None, URI_VARIABLE)


def checked(uri: str | None, where: str) -> str | None:
    """The same address. InputError, which begins with `where`, if it holds a password."""
    try:
        return None if uri is None else without_password(uri)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
