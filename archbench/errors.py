"""The error tree: everything archbench raises on purpose descends from ArchbenchError.

A message says where, what was found, what is allowed and what to do, in one line:

    suites/quick.yaml: cells[1].model.d_modle: unknown key; did you mean 'd_model'?

The command line prints the message alone and exits with code 2; a traceback means a bug in archbench.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ArchbenchError(Exception):
    """Base of every error that a user can cause and mend."""


class ConfigError(ArchbenchError, ValueError):
    """An architecture or training setting has an impossible value."""


class SuiteError(ArchbenchError):
    """A suite file cannot be read as written."""


class DataError(ArchbenchError):
    """A corpus, document or codec cannot be had or read."""


class ContextOverflow(ArchbenchError):
    """More tokens were fed than the model's declared context limit."""


class UnsupportedError(ArchbenchError):
    """A quantity does not exist for this model; the message is the reason shown in its place."""


class CheckpointError(ArchbenchError):
    """A checkpoint is missing, damaged or of another configuration."""


class BackendError(ArchbenchError):
    """A kernel backend was asked for by name and cannot run here."""


class RecordError(ArchbenchError):
    """A results file cannot be read."""


class TrainingError(ArchbenchError):
    """Training cannot go on: the loss or gradient is not finite, or the budget is unreachable."""


class SandboxError(ArchbenchError):
    """Generated code cannot be run safely here; the message says what is missing and how to get it."""


class GateError(ArchbenchError):
    """The regression gate cannot measure: a version, its history or its baseline is not there."""


class MissingExtra(ArchbenchError):
    """An optional package is needed; the message gives the line that installs it."""


def suggestion(found: str, allowed: Iterable[str]) -> str:
    """What to add to a message about an unknown name: the nearest allowed one, or all of them."""
    names = sorted(allowed)
    near = difflib.get_close_matches(found, names, n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"allowed: {', '.join(names)}" if names else "nothing is allowed here"
