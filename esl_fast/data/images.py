"""Images that stay on disk until they are asked for, and a cheap answer to whether they are there."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from esl_fast.data.split import DataError


class ImageFiles:
    """Image files, decoded to RGB when indexed. EXIF orientation is not applied, as in the official transform."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        """The picture at `index`; raises DataError naming the file where it cannot be decoded."""
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return _to_rgb(image)
        except Exception as error:  # Pillow's decoders raise errors of a dozen types on damaged files
            raise DataError(f"{path}: cannot be read as an image ({error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # convert() would clip 16-bit values at 255, which turns them white
        values = np.asarray(image)
        if image.mode != "I" or values.max() > 255:  # 32 bits may hold values of 8
            values = values >> 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


class MappedArray:
    """The rows of a memory-mapped .npy file, copied in their stored dtype when indexed.

    Raises:
        DataError: the file is missing, is no .npy of floating-point numbers, or has not `ndim` axes.
    """

    def __init__(self, path: Path, ndim: int):
        self.path = path
        self._array = _open_array(path)
        if self._array.ndim != ndim:
            axes = "images x features" if ndim == 2 else "images x regions x features"
            raise DataError(f"{path}: expected {ndim} axes ({axes}), found shape {self._array.shape}")
        if not self.feature_dim:
            raise DataError(f"{path}: shape {self._array.shape} holds no number at all")
        if not np.issubdtype(self._array.dtype, np.floating):
            raise DataError(f"{path}: expected floating-point numbers, found {self._array.dtype}")

    @property
    def feature_dim(self) -> int:
        return self._array.shape[-1]

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: int) -> np.ndarray:
        """A copy of one row; raises DataError naming file and row where it holds what is no finite float32."""
        row = np.array(self._array[index])
        with np.errstate(over="ignore"):
            finite = np.isfinite(row.astype(np.float32, copy=False)).all()
        if not finite:
            raise DataError(f"{self.path}: row {index} holds NaN or infinite values, or such that float32 cannot hold")
        return row

    def __getstate__(self) -> dict:
        # pickling a memory map would copy the whole array into every spawned worker
        return {"path": self.path}

    def __setstate__(self, state: dict) -> None:
        self.path = state["path"]
        self._array = _open_array(self.path)


def _open_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as a .npy array ({error})") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: expected a .npy file with one array, found an archive of several")
    return array


class FolderIndex:
    """Which files exist, from one listing of each folder instead of one stat a file."""

    def __init__(self) -> None:
        self._names: dict[Path, set[str]] = {}

    def __contains__(self, path: Path) -> bool:
        folder = path.parent
        if folder not in self._names:
            try:
                with os.scandir(folder) as entries:
                    self._names[folder] = {entry.name for entry in entries if not entry.is_dir()}
            except (FileNotFoundError, NotADirectoryError):
                self._names[folder] = set()
        return path.name in self._names[folder]
