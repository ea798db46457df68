"""Claims on chunks between processes: byte `index` of one file is locked while a process works on chunk `index`.

POSIX record locks vanish with the process that holds them, however it dies, and work over NFS between hosts: there is
no stale claim to judge, no heartbeat and no clock. Where a file system has no locks, work may be done twice, which
costs time and nothing else, as every process makes the same file.
"""

from __future__ import annotations

import errno
import importlib
import os
from pathlib import Path
from typing import Any

try:
    fcntl: Any = importlib.import_module("fcntl")
except ImportError:  # not a POSIX system
    fcntl = None

from diffsamp.files import NotWritten

REDUCE = 1 << 40  # beyond any chunk: the byte of whoever verifies and reduces


class Claims:
    """The claims of this process on a run folder; one per folder and process."""

    def __init__(self, root: Path) -> None:
        path = root / "claims.lock"
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise NotWritten(f"cannot write {path}: {error.strerror or error}") from None
        self.locking = fcntl is not None

    def take(self, index: int) -> bool:
        """Claim a chunk; False when another process has it."""
        if not self.locking:
            return True
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, index)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                self.locking = False
                return True
            raise
        return True

    def release(self, index: int) -> None:
        """Give a chunk up."""
        if self.locking:
            fcntl.lockf(self._handle, fcntl.LOCK_UN, 1, index)

    def close(self) -> None:
        """Give everything up."""
        os.close(self._handle)
