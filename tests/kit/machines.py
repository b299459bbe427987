"""Machines on which something is missing, beside those of kit/mistakes.py."""

import contextlib
import errno
import os
from unittest import mock


def without_locks() -> contextlib.AbstractContextManager[object]:
    """The file system has no locks, as some network file systems."""
    error = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    return mock.patch("fcntl.lockf", side_effect=error)


def without_processes() -> contextlib.AbstractContextManager[object]:
    """No further process may be started, as under a limit."""
    error = OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return mock.patch("os.fork", side_effect=error)
