"""Region features in the layout of the field: `{split}_ims.npy` with `{split}_caps.txt`, five captions a picture."""

from pathlib import Path

import numpy as np

from esl_fast.data.images import MappedArray
from esl_fast.data.karpathy import clean_plain
from esl_fast.data.records import (
    OnError,
    Problems,
    Record,
    assemble,
    clean_captions,
    existing_file,
    existing_folder,
    needed_splits,
)
from esl_fast.data.split import DataError, DataSet, Subset

CAPTIONS_PER_IMAGE = 5


def load_regions(
    root: str | Path | None = None, *, on_error: OnError = "raise", seed: int = 0, only: str | None = None
) -> DataSet:
    """Region features (N, R, F), memory-mapped, with captions in text files; splits train, dev and test.

    `testall` is the test split where it is there: COCO's `test` is a part of it. Where `{split}_ims.npy` repeats
    every image for each of its captions, only the first of the five rows is used. `{split}_ids.txt` is optional.
    """
    root = existing_folder(root, "root")
    files = {"train": "train", "val": "dev", "test": "testall" if (root / "testall_ims.npy").is_file() else "test"}
    for split in ("val", "test") if only is None else ("val",):
        if not (root / f"{files[split]}_ims.npy").is_file():
            del files[split]
    needed = needed_splits(only, files)
    files = {split: prefix for split, prefix in files.items() if split in needed}
    problems = Problems(on_error)
    arrays = {split: MappedArray(root / f"{prefix}_ims.npy", ndim=3) for split, prefix in files.items()}
    first = next(iter(arrays.values()))
    sizes = {array.path.name: array.feature_dim for array in arrays.values()}
    if len(set(sizes.values())) > 1:
        raise DataError(f"{root}: the feature sizes of the splits differ: {sizes}")
    lines = {split: _read_lines(root / f"{prefix}_caps.txt", CAPTIONS_PER_IMAGE) for split, prefix in files.items()}
    if "val" in files and lines["val"] == lines.get("test"):
        raise DataError(f"{root}: dev_caps.txt and {files['test']}_caps.txt are the same; val and test must differ")
    records = []
    for split, prefix in files.items():
        records += _read_split(root, prefix, split, lines[split], arrays[split], problems)
    return assemble(
        "regions",
        records,
        # a split without a file has no records, so any array serves it
        lambda split, rows: Subset(arrays.get(split, first), rows),
        problems,
        seed,
        needed=needed,
        image_kind="regions",
        feature_dim=first.feature_dim,
    )


def _read_split(
    root: Path, prefix: str, split: str, lines: list[str], array: MappedArray, problems: Problems
) -> list[Record]:
    captions_file = root / f"{prefix}_caps.txt"
    images, rest = divmod(len(lines), CAPTIONS_PER_IMAGE)
    if not images:
        raise DataError(f"{captions_file}: holds {len(lines)} captions; expected {CAPTIONS_PER_IMAGE} an image")
    if rest or len(array) not in (images, len(lines)):
        raise DataError(
            f"{array.path}: {len(array)} rows do not fit the {len(lines)} captions of {captions_file}; "
            f"expected {CAPTIONS_PER_IMAGE} captions a row, or each row {CAPTIONS_PER_IMAGE} times"
        )
    rows_per_image = len(array) // images
    if rows_per_image > 1 and not np.array_equal(array[0], array[rows_per_image - 1]):
        raise DataError(
            f"{array.path}: as many rows as {captions_file} has captions, but the first {rows_per_image} rows differ; "
            f"expected one row an image, or each row {rows_per_image} times"
        )
    ids = _read_ids(root / f"{prefix}_ids.txt", prefix, images)
    records = []
    for i, image_id in enumerate(ids):
        first = i * CAPTIONS_PER_IMAGE
        with problems.tolerated():
            captions = clean_captions(
                ((f"{captions_file}: line {j + 1}", lines[j]) for j in range(first, first + CAPTIONS_PER_IMAGE)),
                lambda _, raw: clean_plain(raw),
                problems,
            )
            if not captions:
                raise DataError(f"{captions_file}: line {first + 1}: image '{image_id}' has no captions")
            records.append(Record(image_id, split, captions, i * rows_per_image))
    return records


def _read_ids(path: Path, prefix: str, images: int) -> list[str]:
    if not path.is_file():
        return [f"{prefix}/{i}" for i in range(images)]
    ids = [line.strip() for line in _read_lines(path)]
    if len(ids) == images * CAPTIONS_PER_IMAGE:
        ids = ids[::CAPTIONS_PER_IMAGE]
    if len(ids) != images or len(set(ids)) != images:
        raise DataError(f"{path}: expected {images} different lines, one an image; found {len(set(ids))} of {len(ids)}")
    return ids


def _read_lines(path: Path, group: int = 1) -> list[str]:
    """Lines without blank ones at the end, but for such as complete a group that has others."""
    try:
        # not splitlines(): it also breaks at characters that may stand inside a caption
        lines = existing_file(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error})") from error
    while lines and not lines[-1].strip() and (len(lines) % group or not any(map(str.strip, lines[-group:]))):
        lines.pop()
    return lines
