"""Errors that a user can act on; every one of them ends the program with exit code 2 and one line.

A message says what was found, what was expected and what is allowed. Anything that is not a `DasError` is a bug and
keeps its traceback.
"""

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
"""Stopped on request with a checkpoint saved: the same command continues (EX_TEMPFAIL, "try again later")."""


class DasError(Exception):
    """Base of all errors that are the user's to mend."""


class ConfigError(DasError):
    """A key or value of the run config, or its contradiction with the DeepSpeed file."""


class DataError(DasError):
    """A corpus that is missing, empty, unreadable or too small."""


class ModelError(DasError):
    """A model or tokenizer that cannot be loaded, or a model without an architecture spec."""


class ImportanceError(DasError):
    """An importance file that belongs to another model or is damaged."""


class RunFolderError(DasError):
    """An output folder that belongs to another run or cannot be written."""


class TrainingError(DasError):
    """Training that cannot go on, such as a loss that is no longer finite."""


class CheckpointError(DasError):
    """Checkpoints that cannot be written, or of which none is whole."""


class PreflightError(DasError):
    """Ranks that do not find each other, or anything else that a check before a run found wrong."""


class StoppedError(Exception):
    """The run was asked to stop and everything is saved; ends the program with `EXIT_STOPPED`."""


def first_line(error: Exception) -> str:
    """The first line of an error's text, which libraries may write many of, else its name."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
