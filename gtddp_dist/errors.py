"""Errors that are the user's to mend, and the exit codes of the command `gtddp`.

This is the one place where exit codes are defined; everything else refers to them by name.
"""

from __future__ import annotations

from typing import Final

OK: Final = 0
"""The command did what it was asked to do."""

FAILED: Final = 1
"""The command failed: an unexpected error, or training stopped by itself (too many non-finite steps)."""

BAD_INPUT: Final = 2
"""The command line, the configuration, or a file it names is wrong. Nothing was changed."""

REQUEUE: Final = 75
"""Stopped on request with a complete checkpoint: run again with `--resume` (EX_TEMPFAIL of sysexits.h)."""


class UserError(Exception):
    """Bad input. The message says what was wrong, where, and what to do.

    The command line prints it without a traceback and exits with `exit_code`.
    """

    exit_code: int = BAD_INPUT


class ToldElsewhere(UserError):
    """Another rank tells the user what is wrong; this one only ends, with the same exit code."""

    def __init__(self, exit_code: int = BAD_INPUT) -> None:
        super().__init__("rank 0 tells what is wrong")
        self.exit_code = exit_code


class ConfigError(UserError):
    """A configuration that cannot be used. The message lists every problem found, not only the first."""


class ModelError(UserError):
    """A network that the optimizer cannot take. The message names the module, and what to do about it."""


class OptionError(UserError, ValueError):
    """A value that an optimizer does not take. The message names the option and what is expected."""


class StepError(UserError, RuntimeError):
    """A training step that cannot be taken, such as one without a backward pass. Nothing was changed."""


class CurvatureError(UserError, ArithmeticError):
    """A curvature estimate that cannot be used: factors that are not finite, decompositions that keep failing.

    Training has failed; the input need not be wrong.
    """

    exit_code = FAILED
