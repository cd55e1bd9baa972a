"""MS-COCO, in both layouts of its captions; the images lie in train2014/ and val2014/."""

from collections.abc import Callable
from pathlib import Path

from esl_fast.data.images import FolderIndex, ImageFiles
from esl_fast.data.karpathy import clean_plain
from esl_fast.data.records import (
    OnError,
    Problems,
    assemble,
    existing_file,
    existing_folder,
    needed_splits,
    read_entries,
    read_records,
    splits_of,
)
from esl_fast.data.split import DataError, DataSet

FILE_OF = {"train": "train_coco.json", "val": "dev_coco.json", "test": "testall_coco.json"}


def load_coco(
    root: str | Path | None = None,
    *,
    annotations: str | Path | None = None,
    image_root: str | Path | None = None,
    on_error: OnError = "raise",
    seed: int = 0,
    only: str | None = None,
) -> DataSet:
    """MS-COCO with Karpathy's splits; `restval` counts as train. All captions of an image are kept.

    Args:
        root: folder with the annotations and, unless `image_root` is given, `train2014/` and `val2014/`.
        annotations: a Karpathy file, or a folder that holds `dataset_coco.json` or else `train_coco.json`,
            `dev_coco.json` and `testall_coco.json`; `root` by default.
        image_root: folder with `train2014/` and `val2014/`.
    """
    source = Path(annotations) if annotations is not None else existing_folder(root, "root")
    if image_root is not None:
        image_root = existing_folder(image_root, "image_root")
    elif root is not None:
        image_root = existing_folder(root, "root")
    else:
        image_root = source if source.is_dir() else source.parent
    problems = Problems(on_error)
    single = source if not source.is_dir() else source / "dataset_coco.json"
    records = []
    if single == source or single.is_file():
        entries = read_entries(existing_file(single))
        needed = needed_splits(only, splits_of(entries))
        locate = _locator(image_root, "filename")
        records += read_records(single, entries, problems, clean=clean_plain, locate=locate, splits=needed)
    else:
        files = {split: source / name for split, name in FILE_OF.items() if (source / name).is_file()}
        needed = needed_splits(only, files)
        if any(split not in files for split in needed if split != "val"):
            names = ", ".join(FILE_OF[split] for split in needed)
            raise DataError(f"{source}: expected dataset_coco.json, or {names}; found neither")
        for split in needed:
            if split in files:
                entries, locate = read_entries(files[split]), _locator(image_root, "file_name")
                options = {"name_key": "file_name", "split": split}
                records += read_records(files[split], entries, problems, clean=clean_plain, locate=locate, **options)
    return assemble("coco", records, lambda _, paths: ImageFiles(paths), problems, seed, needed=needed)


def _locator(image_root: Path, name_key: str) -> Callable[[int, dict], Path]:
    index = FolderIndex()

    def locate(_: int, entry: dict) -> Path:
        name = entry[name_key]
        folders = ["train2014", "val2014", ""]
        named = entry.get("filepath") or next((f for f in folders[:2] if name.startswith(f"COCO_{f}_")), "train2014")
        folders.insert(0, str(named))
        for folder in folders:
            if image_root / folder / name in index:
                return image_root / folder / name
        raise DataError(f"no such image file in {' or '.join(str(image_root / f) for f in dict.fromkeys(folders))}")

    return locate
