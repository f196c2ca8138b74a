"""A directory that appears complete under its name or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma2_fast.errors import CapacityError, RequestError
from gemma2_fast.weights.messages import listed, quoted

# What the name of a directory ends with until it is complete.
UNFINISHED = ".unfinished"

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def check_destination(path: Path, overwrite: bool, replaceable: Callable[[str], bool]) -> None:
    """RequestError where a directory cannot be written at `path` without losing what stands there.

    replaceable: whether a file of such a name may be deleted with `overwrite`; directories never are.
    """
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise RequestError(f"{path} exists and is not a directory; give another destination")
    found = sorted(entry.name for entry in path.iterdir())
    if not found:
        return
    if not overwrite:
        raise RequestError(f"{path} exists and holds {listed(found)}; give another destination, or --overwrite it")
    foreign = _foreign(path, replaceable)
    if foreign:
        raise RequestError(f"{path} holds {listed(foreign)}, which --overwrite does not delete; move it away first")


@contextmanager
def new_directory(path: Path, num_bytes: int, *, overwrite: bool, replaceable: Callable[[str], bool]) -> Iterator[Path]:
    """An empty directory beside `path` that takes its name when the block ends well, and vanishes when it does not.

    What a killed process left of an earlier try is replaced. CapacityError where the disk has no room for `num_bytes`.
    """
    path = path.resolve()
    check_destination(path, overwrite, replaceable)
    unfinished = path.with_name(path.name + UNFINISHED)
    unfinished.mkdir(parents=True, exist_ok=True)
    lock = os.open(unfinished, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _claim(unfinished, lock, replaceable)
        try:
            _check_space(path, num_bytes)
            yield unfinished
            os.fsync(lock)
            _put_in_place(unfinished, path)
        except BaseException as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in _NO_SPACE:
                raise CapacityError(f"the disk of {path.parent} is full; nothing was left there: {error}") from error
            raise
    finally:
        os.close(lock)


def _claim(unfinished: Path, lock: int, replaceable: Callable[[str], bool]) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RequestError(f"{unfinished} is being written by another process; wait for it") from None
    foreign = _foreign(unfinished, replaceable)
    if foreign:
        raise RequestError(f"{unfinished} is in the way and holds {listed(foreign)}; move it away first")
    for entry in unfinished.iterdir():
        entry.unlink()


def _foreign(directory: Path, replaceable: Callable[[str], bool]) -> list[str]:
    return sorted(
        quoted(entry.name)
        for entry in directory.iterdir()
        if not replaceable(entry.name) or (entry.is_dir() and not entry.is_symlink())
    )


def _check_space(path: Path, num_bytes: int) -> None:
    free_bytes = shutil.disk_usage(path.parent).free
    if num_bytes > free_bytes:
        raise CapacityError(
            f"{path} takes {num_bytes / 1e9:.2f} GB and {path.parent} has {free_bytes / 1e9:.2f} GB free; "
            "make room or give another destination"
        )


def _put_in_place(unfinished: Path, path: Path) -> None:
    replaced = path.with_name(path.name + ".replaced")
    if path.exists() and any(path.iterdir()):
        path.rename(replaced)
        try:
            unfinished.rename(path)
        except BaseException:
            replaced.rename(path)
            raise
        shutil.rmtree(replaced)
    else:
        unfinished.rename(path)
