"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import BinaryIO

from .errors import DiffsampError


class AlreadyThere(DiffsampError):
    """A file that exists and was not to be replaced."""


class NotWritten(DiffsampError):
    """A file that the disk did not take: it is full, read-only, or not there."""


def write_whole(path: Path, data: bytes, *, overwrite: bool = False) -> None:
    """Write ``data`` so that ``path`` is seen either not at all or complete; its folder is made if need be.

    A temporary name, fsync, rename. The rename itself is not synced: after a power failure the file may be missing,
    never torn. On Linux even the temporary name appears only when all is written, so that a kill leaves no
    partial file.

    Without ``overwrite`` one of several processes that come at once gets the name and the others are told.

    Raises:
        AlreadyThere: the file exists and ``overwrite`` is off.
        NotWritten: it cannot be written.
    """
    path = Path(path)
    if not overwrite and path.exists():
        raise _taken(path)
    # A random name: processes of several hosts may share a folder and a process number.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        try:
            _fill(temporary, data)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            _fill(temporary, data)
        if overwrite:
            os.replace(temporary, path)
        else:
            _name(temporary, path)
    except FileExistsError:
        _discard(temporary)
        raise _taken(path) from None
    except OSError as error:
        _discard(temporary)
        raise NotWritten(f"cannot write {path}: {error.strerror or error}") from None
    except BaseException:
        _discard(temporary)
        raise


def _fill(temporary: Path, data: bytes) -> None:
    """Write and sync the temporary file; without a name until it is whole where the file system can do that."""
    unnamed = _unnamed(temporary.parent)
    if unnamed is not None:
        with open(unnamed, "wb") as file:
            _put(file, data)
            if _named(unnamed, temporary):
                return
    with open(temporary, "wb") as file:
        _put(file, data)


def _put(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _named(descriptor: int, path: Path) -> bool:
    """Give the open file without a name this one; False where the file system has no links."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # With ``dst_dir_fd`` the call follows the link in /proc to the file itself.
        os.link(f"/proc/self/fd/{descriptor}", path.name, dst_dir_fd=folder, follow_symlinks=True)
    except OSError:
        return False
    finally:
        os.close(folder)
    return True


def _unnamed(folder: Path) -> int | None:
    """Descriptor of a new file in ``folder`` that has no name, or None where there is no such thing."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except OSError:
        return None


def _name(temporary: Path, path: Path) -> None:
    """Give the file its name unless it is taken; a link is refused where a rename would replace."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.replace(temporary, path)
    else:
        temporary.unlink()


def _taken(path: Path) -> AlreadyThere:
    return AlreadyThere(f"out: {path} exists; choose another place or use --force")


def _discard(temporary: Path) -> None:
    with contextlib.suppress(OSError):  # it may never have been made
        temporary.unlink()


def check_folder(path: Path, *, force: bool = False) -> None:
    """Refuse what :func:`output_folder` refuses about what is there, and make nothing.

    Raises:
        DiffsampError: ``path`` is a file, or a folder that holds something without ``force``.
    """
    if path.is_file():
        raise DiffsampError(f"out: {path} is a file; give a folder")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise DiffsampError(f"out: {path} exists and is not empty; choose another folder or use --force")


def output_folder(path: Path, *, force: bool = False) -> Path:
    """``path`` as a folder to write results into: made if need be; one that holds files needs ``force``.

    Raises:
        DiffsampError: it is a file, is not empty without ``force``, or is not writable.
    """
    path = Path(path)
    check_folder(path, force=force)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiffsampError(f"out: cannot make {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise DiffsampError(f"out: {path} is not writable")
    for left in path.glob(".*.partial"):
        left.unlink(missing_ok=True)
    return path


def next_folder(parent: Path, stem: str) -> Path:
    """``parent/stem-0001`` and so on: the first number that is not taken."""
    number = 1
    while (parent / f"{stem}-{number:04d}").exists():
        number += 1
    return parent / f"{stem}-{number:04d}"
