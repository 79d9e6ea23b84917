"""The two ways work can end badly: the user's input is wrong, or bytes on disk are."""

from __future__ import annotations


class InputError(ValueError):
    """What the user gave cannot be used; the command ends with exit code 2.

    The message says what was found, what was wanted, and what to do.
    """


class DamageError(RuntimeError):
    """A file that we wrote is not what its record says; the command ends with exit code 1.

    The message names the file and the command that repairs it.
    """


class WorkError(RuntimeError):
    """The work itself failed (a worker died too often, a loss became NaN); exit code 1."""


class BusyError(WorkError):
    """Another run holds what this one needs: nothing failed, and it may be tried again later; exit code 1."""
