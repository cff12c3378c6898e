"""File locks between processes, exclusive or shared; a lock ends with its file or its process."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import IO

ATTEMPTS = 100
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def acquire(
    path: Path, *, shared: bool = False, wait: bool = True, read_only: bool = False
) -> IO[str] | None:
    """Lock a file, which is created with its folder, until the returned file is closed.

    Whoever holds the lock may remove its file: who waited for it then takes the new one.

    Args:
        path: the lock file.
        shared: beside other shared locks, else alone.
        wait: for those who hold it.
        read_only: also lock a file that may only be read.

    Returns:
        The open file; None when the lock is taken and not `wait`.

    Raises:
        OSError: the file cannot be created or locked, or is removed again and again.
    """
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    problem: OSError = OSError(errno.EAGAIN, "its lock file is removed again and again", str(path))
    for _ in range(ATTEMPTS):
        try:
            handle = _open(path, read_only=read_only)
        except FileNotFoundError as error:
            problem = error
            # It fails with FileExistsError when another process removes the folder meanwhile.
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except (FileNotFoundError, FileExistsError) as again:
                problem = again
            continue
        try:
            fcntl.flock(handle, operation)
            if os.fstat(handle.fileno()).st_ino == path.stat().st_ino:
                return handle
        except BlockingIOError:
            handle.close()
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            handle.close()
            raise
        handle.close()
    raise problem


def _open(path: Path, *, read_only: bool) -> IO[str]:
    try:
        return open(path, "a", encoding="ascii")
    except OSError as error:
        if not read_only or error.errno not in READ_ONLY:
            raise
        return open(path, encoding="ascii")
