"""Files and folders that appear whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``folder`` when the block ends well, and vanishes when it does not.

    At every moment either ``folder`` or ``folder.old`` is a complete former one (see :func:`existing`).
    """
    new = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    old = folder.with_name(f"{folder.name}.old")
    new.mkdir(parents=True)
    try:
        yield new
        for path in new.iterdir():
            path.chmod(new.stat().st_mode & 0o666)  # safetensors lets the owner alone read, whatever the umask
            _sync(path)
        _sync(new)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        for stale in folder.parent.glob(f"{folder.name}.tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """A text file that takes the place of ``path`` whole or not at all."""
    new = path.with_name(f"{path.name}.tmp")
    try:
        new.write_text(text)
        _sync(new)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def existing(folder: Path) -> Path:
    """``folder``, or what it was before a replacement that never finished."""
    old = folder.with_name(f"{folder.name}.old")
    return old if not folder.exists() and old.exists() else folder
