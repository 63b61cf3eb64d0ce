"""Files are written beside their target and renamed. Reading a truncated, corrupt or foreign one raises an error."""

import contextlib
import io
import os
import secrets
import shutil
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stable_baselines3.common.save_util import open_path

SUFFIX = ".sb3_dqs_tmp"
# Nobody writes any more to a temporary file that has not changed for so many seconds
ABANDONED_AFTER = 3600


@contextlib.contextmanager
def atomic(path: str | Path | io.BufferedIOBase, suffix: str) -> Iterator[Any]:
    """
    What to write to, so that at any moment ``path`` is the old file or the new one: a temporary file beside it, which is
    renamed at the end. It is removed when an exception comes; one that a killed process left, when the same target is written
    an hour later or more.

    :param path: as SB3 takes it: gets ``suffix`` if it has none; folders are made; a file object or a device is written to
        as it is
    :param suffix: ``"zip"``, ``"pkl"``, ...
    """
    if not isinstance(path, (str, os.PathLike)):
        yield path
        return
    target = _target(Path(path), suffix)
    if target.exists() and not target.is_file():
        yield target
        return
    prefix = f".{zlib.crc32(target.name.encode()):08x}-"
    _sweep(target.parent, prefix)
    temporary = target.with_name(f"{prefix}{secrets.token_hex(4)}{SUFFIX}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # the new name must survive a power failure, too; not all systems can say so
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _target(path: Path, suffix: str) -> Path:
    """The file that SB3 would write, with its warnings; links are followed."""
    if path.suffix == "" and suffix:
        path = Path(f"{path}.{suffix}")
    if path.is_dir():
        warnings.warn(f"Path '{path}' is a folder. Will save instead to {path}_2", stacklevel=4)
        path = Path(f"{path}_2")
    if not path.parent.exists():
        warnings.warn(f"Path '{path.parent}' does not exist. Will create it.", stacklevel=4)
        path.parent.mkdir(exist_ok=True, parents=True)
    return path.resolve()


def _sweep(folder: Path, prefix: str) -> None:
    """Remove the temporary files of killed processes, by their age."""
    for left_over in folder.glob(f"{prefix}*{SUFFIX}"):
        with contextlib.suppress(OSError):
            if time.time() - left_over.stat().st_mtime > ABANDONED_AFTER:
                left_over.unlink()


def check_model_file(path: str | Path | io.BufferedIOBase) -> None:
    """
    Check that a file is a whole model, before anything in it is unpickled.

    :param path: the file
    :raises ValueError: naming the file, and what is wrong with it
    """
    try:
        with contextlib.ExitStack() as stack:
            file = open_path(path, "r", suffix="zip")
            if file is not path:
                stack.enter_context(file)
            archive = stack.enter_context(zipfile.ZipFile(file))
            missing = {"data", "policy.pth"} - set(archive.namelist())  # a truncated file may look like its last member
            bad = archive.testzip()
            problem = f"it has no {min(missing)}" if missing else f"{bad} does not have its checksum" if bad else ""
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        problem = str(error)
    if problem:
        raise ValueError(
            f"path={path}: the file is truncated or corrupt, or no model that save() wrote: {problem}; "
            "load an earlier checkpoint."
        )
