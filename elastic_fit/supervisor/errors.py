"""The one family of errors that elastic-fit raises for people to read."""

from __future__ import annotations

from typing import ClassVar


class ElasticFitError(Exception):
    """Something went wrong that a person can act on.

    ``str(error)`` is one sentence: what happened, and to which file or rank. `hint` says what to do about it and
    may be empty. The command prints both and ends with `exit_code`; a traceback is never shown for these.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, dict(self.__dict__))


def _rebuild(kind: type[ElasticFitError], message: str, fields: dict[str, object]) -> ElasticFitError:
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    error.__dict__.update(fields)
    return error


class UsageError(ElasticFitError):
    """The command line or an argument is wrong (exit 2)."""

    exit_code = 2


class PortTaken(ElasticFitError):
    """A port that the command line asks for can't be listened on here (exit 1: it may be free the next time)."""

    @classmethod
    def by(cls, flag: str, port: int, error: Exception) -> PortTaken:
        """Of the error that the attempt to listen ended with."""
        return cls(
            f"{flag} {port} can't be listened on here: {error}",
            hint="leave it out and any free port is taken; ss -ltnp shows who has it",
        )


class StorageError(ElasticFitError):
    """The run folder or a checkpoint can't be used as it stands (exit 74, EX_IOERR)."""

    exit_code = 74


class RunIsHeld(StorageError):
    """Another live supervisor holds this run folder."""


class NoValidCheckpoint(StorageError):
    """There are checkpoints, and every one of them was rejected."""


class FencedOff(StorageError):
    """A newer generation has taken the run; this one may not commit any more."""
