"""The errors a user can meet; each carries the exit code of the command that raised it."""

import errno

STOPPED = 75
"""Exit code of a command that was stopped on request; the same command continues."""


class ThreeTowersError(Exception):
    """Base of the errors that a user can correct; the message says what is wrong, where, and what to do."""

    exit_code = 1


class UsageError(ThreeTowersError):
    """A command, an option or a configuration that is not valid."""

    exit_code = 2


class DataError(ThreeTowersError):
    """Data that cannot be read, or that holds nothing usable."""

    exit_code = 3


class CheckpointError(ThreeTowersError):
    """Weights or a checkpoint that are missing, damaged or do not fit."""

    exit_code = 3


class NonFiniteError(ThreeTowersError):
    """Training produced values that are not finite and could not recover."""

    exit_code = 4


class LostProcessError(ThreeTowersError):
    """Another process of a run is gone, so this one cannot go on."""


class BadSample(Exception):  # noqa: N818 - a finding about one sample, not a failure of the program
    """One sample that cannot be used: its id, a short reason from a closed list, and the detail."""

    def __init__(self, id: str, reason: str, detail: str = "") -> None:
        super().__init__(id, reason, detail)  # positional, so that it survives pickling between workers
        self.id = id
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


REMEDIES = {
    errno.EEXIST: "A folder is needed here; give another --out",
    errno.ENOTDIR: "A folder is needed here; give another --out",
    errno.EACCES: "Give a path that you may read and write",
    errno.EROFS: "Give an --out that can be written",
    errno.ENOSPC: "Make room and give the same command again",
    errno.EDQUOT: "Make room in your quota and give the same command again",
    errno.EFBIG: "Files may not be this large here (see `ulimit -f`); give another --out",
}


def of_system(error: OSError) -> str:
    """An error of the operating system in one line: the file, the reason and, where it is known, what to do."""
    said = f"{error.filename or 'files'}: {error.strerror or error}"
    remedy = REMEDIES.get(error.errno or 0)
    return f"{said}. {remedy}" if remedy else said
