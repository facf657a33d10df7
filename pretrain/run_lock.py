"""One process at a time works in a run's folder, and all of its ranks in the same one. It begins by removing what a
killed one left, and a disk that fails ends it in a line that says what still stands."""

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO

from pretrain import checkpoints, distributed
from pretrain.errors import DiskError, Unwritable, UserError, disk_problem, one_line
from pretrain.files import remove_parts, writing
from pretrain.log import log

NAME = ".lock"


@contextmanager
def run_lock(folder: str | Path, newest: Callable[[Path], Path | None] | None = None) -> Iterator[None]:
    """Hold a run's folder on the first rank. The system sets it free when the process ends, however it does.

    The lock is POSIX's: processes that are started meanwhile do not hold it, and it works over NFS from version 4 on. On
    a file system without locks nothing is held, which is said, and nothing is removed.

    Args:
        newest: finds the run's newest whole checkpoint; none: one of :mod:`pretrain.checkpoints`.

    Raises:
        UserError: another process works there; names it.
        DiskError: inside, the disk was full, or broken; names the file and the newest whole checkpoint.
    """
    try:
        with nullcontext() if os.environ.get("RANK", "0") != "0" else _holding(Path(folder)):
            yield
    except OSError as error:
        if not (problem := disk_problem(error)):
            raise
        if not isinstance(error, Unwritable) and not error.filename:
            problem = disk_problem(Unwritable(f"a file of {folder}", error))
        told, _, way = problem.rpartition("; ")
        raise DiskError(f"{told}; {_what_stands(Path(folder), newest)}; {way}") from error


def tidy(*folders: Path) -> None:
    """Remove what killed processes left in folders that several processes may share (:func:`run_lock`), but for those
    that another one holds."""
    for folder in folders:
        if folder.is_dir():
            with suppress(UserError), run_lock(folder):
                pass


def _what_stands(folder: Path, newest: Callable[[Path], Path | None] | None) -> str:
    with suppress(UserError, OSError):
        last = newest(folder) if newest else next(iter(checkpoints.whole_directories(folder)), None)
        if last is not None:
            return f"the newest whole checkpoint is {last}"
    return f"{folder} holds no whole checkpoint"


@contextmanager
def _holding(folder: Path) -> Iterator[None]:
    path = folder / NAME
    is_new = not folder.exists()
    file, is_locked = _held(path)
    with file:
        try:
            with writing(path):
                os.ftruncate(file.fileno(), 0)
                os.write(file.fileno(), _me().encode())
                os.fsync(file.fileno())
            if is_locked:
                checkpoints.clean(folder)
                if removed := remove_parts(folder):
                    log(f"{folder}: removed what a killed process left: {', '.join(map(one_line, removed))}")
            yield
        finally:
            # Still held: whoever has opened it meanwhile finds another file in its place
            path.unlink(missing_ok=True)
            if is_new and folder.is_dir() and not any(folder.iterdir()):  # nothing was begun
                folder.rmdir()


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


def _held(path: Path) -> tuple[IO[str], bool]:
    """The lock's file, open, and whether it could be locked; errors as :func:`run_lock`."""
    while True:
        is_locked = True
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
            is_locked = False
            log(f"{path.parent}: this file system has no locks; let one process at a time work there")
        try:
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                return file, is_locked
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
