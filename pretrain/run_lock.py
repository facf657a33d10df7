"""One process at a time works in a run's folder, and all of its ranks in the same one."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pretrain import distributed
from pretrain.errors import UserError
from pretrain.log import log

NAME = ".lock"


@contextmanager
def run_lock(folder: str | Path) -> Iterator[None]:
    """Hold a run's folder on the first rank. The system sets it free when the process ends, however it does.

    The lock is POSIX's: processes that are started meanwhile do not hold it, and it works over NFS from version 4 on. On
    a file system without locks nothing is held, which is said.

    Raises:
        UserError: another process works there; names it.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    path = Path(folder) / NAME
    is_new = not path.parent.exists()
    with _held(path) as file:
        file.truncate(0)
        file.write(_me())
        file.flush()
        os.fsync(file.fileno())
        try:
            yield
        finally:
            # Still held: whoever has opened it meanwhile finds another file in its place
            path.unlink(missing_ok=True)
            if is_new and path.parent.is_dir() and not any(path.parent.iterdir()):  # nothing was begun
                path.parent.rmdir()


def is_held(folder: str | Path) -> bool:
    """Whether a process works in a run's folder, as far as this machine can tell."""
    try:
        with open(Path(folder) / NAME, "r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _held(path: Path) -> IO[str]:
    """The lock's file, open and locked; errors as :func:`run_lock`."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                who = file.read().strip() or "another process"
                file.close()
                raise UserError(
                    f"{path.parent}: {who} is working there; wait for it, or choose another folder"
                ) from error
            log(f"{path.parent}: this file system has no locks; let one process at a time work there")
        try:
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                return file
        except FileNotFoundError:
            pass
        file.close()  # its holder has removed it at its end: once more


def check_seen(folder: str | Path) -> None:
    """Every rank calls this under :func:`run_lock`, once the ranks have met: they must see one folder, not each
    its own machine's of that name.

    Raises:
        UserError: on every rank, where one does not see the first rank's file; names the folder.
    """
    path = Path(folder) / NAME
    first = distributed.gather_objects(_me())[0]
    told = f"{path.absolute().parent} on {socket.gethostname()}"
    # The first rank must not open the file again: closing it would set the lock free.
    seen = distributed.is_main() or _content(path) == first
    blind = [where for where in distributed.gather_objects(None if seen else told) if where]
    if blind:
        raise UserError(
            f"{folder}: {blind[0]} is not the folder of the first process; all machines must see one folder"
        )


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _content(path: Path) -> str:
    """Of a file; nothing where there is none."""
    try:
        for folder in (path.parent.parent, path.parent):  # a look at them makes NFS ask its server anew
            next(os.scandir(folder), None)
        return path.read_text()
    except OSError:
        return ""
