"""Karpathy files with a folder of images: Flickr30K and any other set in that form."""

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esl_fast.data.images import FolderIndex, ImageFiles
from esl_fast.data.records import (
    OnError,
    Problems,
    assemble,
    existing_folder,
    find_annotations,
    needed_splits,
    read_entries,
    read_records,
    splits_of,
)
from esl_fast.data.split import DataError, DataSet


def clean_plain(raw: str) -> str:
    """Lower case, no outer blanks: the form of COCO's captions, and of every set without a rule of its own."""
    return raw.strip().lower()


def clean_flickr30k(raw: str) -> str:
    """Lower case without outer full stops; the blank before a last " ." goes with it."""
    return raw.strip(string.whitespace + ".").lower()


def load_flickr30k(
    root: str | Path | None = None,
    *,
    annotations: str | Path | None = None,
    image_root: str | Path | None = None,
    on_error: OnError = "raise",
    seed: int = 0,
    only: str | None = None,
) -> DataSet:
    """Flickr30K: `dataset_flickr30k.json` in `root`, or the file `annotations`, and a folder of JPEGs.

    The images lie in `image_root`, or else in `root` or its folder flickr30k-images, flickr30k_images or images.
    """
    path = find_annotations(annotations, root, "dataset_flickr30k.json")
    return _load("flickr30k", path, root, image_root, clean_flickr30k, on_error, seed, only)


def load_karpathy(
    root: str | Path | None = None,
    *,
    annotations: str | Path | None = None,
    image_root: str | Path | None = None,
    on_error: OnError = "raise",
    seed: int = 0,
    only: str | None = None,
) -> DataSet:
    """Any Karpathy file: the only `dataset*.json` in `root`, or the file `annotations`. Images as in Flickr30K."""
    path = find_annotations(annotations, root, "dataset*.json")
    return _load("karpathy", path, root, image_root, clean_plain, on_error, seed, only)


def _load(
    name: str,
    path: Path,
    root: str | Path | None,
    image_root: str | Path | None,
    clean: Callable[[str], str],
    on_error: OnError,
    seed: int,
    only: str | None,
) -> DataSet:
    entries = read_entries(path)
    index = FolderIndex()
    folder = _image_folder(entries, index, path, root, image_root)

    def locate(_: int, entry: dict) -> Path:
        file = folder / _relative_path(entry)
        if file not in index:
            raise DataError(f"no image file {file}")
        return file

    problems = Problems(on_error)
    needed = needed_splits(only, splits_of(entries))
    records = read_records(path, entries, problems, clean=clean, locate=locate, splits=needed)
    return assemble(name, records, lambda _, paths: ImageFiles(paths), problems, seed, needed=needed)


def _relative_path(entry: dict) -> Path:
    return Path(str(entry.get("filepath") or ""), str(entry["filename"]))


def _image_folder(
    entries: list[Any], index: FolderIndex, path: Path, root: str | Path | None, image_root: str | Path | None
) -> Path:
    if image_root is not None:
        return existing_folder(image_root, "image_root")
    root = path.parent if root is None else existing_folder(root, "root")
    named = (entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("filename"), str))
    files = [_relative_path(entry) for entry in named]
    candidates = [root / name for name in ("flickr30k-images", "flickr30k_images", "images")] + [root]
    best = max(candidates, key=lambda folder: sum(folder / file in index for file in files))
    if files and not any(best / file in index for file in files):
        looked = ", ".join(map(str, candidates))
        raise DataError(f"{path}: none of its images was found in {looked}; name their folder with image_root=")
    return best
