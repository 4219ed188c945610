"""The errors a caller can cause. Every one is an `AutoplanError`."""

from __future__ import annotations


class AutoplanError(Exception):
    """Something the caller asked for cannot be done; the message says what, where and what to do instead."""


class RecordingError(AutoplanError):
    """The model could not be recorded, or a recording does not fit what is asked of it."""


class CandidateError(AutoplanError):
    """A candidate is unknown, registered twice, or cannot do what was demanded of it."""


class KernelError(AutoplanError):
    """A kernel is unknown, or was handed tensors or shapes that it does not support."""


class BudgetError(AutoplanError):
    """A budget is malformed or names a preset that does not exist."""


class PlanMismatchError(AutoplanError):
    """A plan was made for another model; the message names the layers that differ."""


class CacheError(AutoplanError):
    """A plan or cache file cannot be trusted, read or written."""
