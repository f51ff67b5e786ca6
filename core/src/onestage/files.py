"""Files that are there whole or not at all, and their digests; importing this does not import torch."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from onestage.errors import MachineError


def write_atomically(path: str | Path, data: bytes | memoryview) -> None:
    """Writes under a temporary name, syncs, reads back, renames.

    Raises:
        MachineError: not enough space, the file cannot be written, or it reads back differently.
    """
    with replacing(Path(path), expected=data) as file:
        file.write(data)


@contextmanager
def replacing(path: Path, *, text: bool = False, expected: bytes | memoryview | None = None) -> Iterator[IO[Any]]:
    """A file to write that takes the place of `path` if the block ends without an error.

    Until then it lies beside it under a temporary name; folders are made.

    Args:
        path: Where it goes.
        text: It takes text, not bytes.
        expected: All that will be written, if that is known: there must be space for it, and it is read back.

    Raises:
        MachineError: not enough space, the file cannot be written, or it reads back differently.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if expected is not None and shutil.disk_usage(path.parent).free < len(expected):
            raise _no_space(path, expected)
        with open(temporary, "w" if text else "wb", encoding="utf-8" if text else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if expected is not None:
            with open(temporary, "rb") as written:
                _compare(written, expected, path)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _no_space(path, expected) from error
        raise MachineError(f"cannot write '{path}': {error.strerror}", "give a folder you may write to") from error
    finally:
        if temporary.is_file():
            temporary.unlink()


def file_digest(path: str | Path) -> str:
    """Hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _compare(file: IO[bytes], data: bytes | memoryview, path: Path) -> None:
    view, position = memoryview(data), 0
    while chunk := file.read(1 << 22):
        if chunk != bytes(view[position : position + len(chunk)]):  # views are compared item by item
            break
        position += len(chunk)
    if position != len(view):
        raise MachineError(f"'{path}' reads back differently from what was written", "check the disk")


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # Windows cannot open folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _size(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e5 else f"{number / 1e3:.1f} kB"


def _no_space(path: Path, expected: bytes | memoryview | None) -> MachineError:
    needed = "" if expected is None else f"{_size(len(expected))} needed, "
    return MachineError(
        f"no space to write '{path}': {needed}{_size(shutil.disk_usage(path.parent).free)} free",
        "free some space, or give --output a folder on another disk; what was saved before is untouched",
    )
