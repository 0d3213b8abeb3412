"""User errors: each of them ends the program with exit code 2 and a one-line message.

A message names what was found, what was expected or is allowed, and what to do. Any other exception is a bug and keeps
its traceback.
"""

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
"""Stopped on request with a checkpoint saved: the same command resumes (EX_TEMPFAIL, "try again later")."""


class DasError(Exception):
    """Base class of user errors; the CLI prints them as one line and exits with code 2."""


class ConfigError(DasError):
    """A wrong key or value in the run config, or a contradiction with the DeepSpeed file."""


class DataError(DasError):
    """A corpus that is missing, empty, unreadable or too small."""


class ModelError(DasError):
    """A model or tokenizer that cannot be loaded, or a model without an architecture spec."""


class ImportanceError(DasError):
    """An importance file that belongs to another model or is corrupt."""


class RunFolderError(DasError):
    """An output folder that belongs to another run or cannot be written."""


class TrainingError(DasError):
    """Training that cannot continue, such as a loss that is no longer finite."""


class CheckpointError(DasError):
    """Checkpoints that cannot be written, or of which none is valid."""


class PreflightError(DasError):
    """A failed rendezvous of the ranks, or a failed check before a run."""


class StoppedError(Exception):
    """The run was asked to stop and everything is saved; ends the program with `EXIT_STOPPED`."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class name if that is empty."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
