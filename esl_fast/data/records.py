"""From annotation records to splits: the checks and error messages that all loaders share."""

import json
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

from tqdm import tqdm

from esl_fast.data.split import DataError, DataSet, ImageKind, Images, Split, Subset, carve_validation

OnError = Literal["raise", "skip"]

SPLITS = ("train", "val", "test")
SPLIT_OF = {"train": "train", "restval": "train", "val": "val", "test": "test"}


@dataclass
class Record:
    """One image of an annotation file; `source` is its path, or its row in an array."""

    image_id: str
    split: str
    captions: list[str]
    source: Any


class Problems:
    """What becomes of a record that cannot be used: it ends the loading, or it is left out and counted."""

    def __init__(self, on_error: OnError):
        self.skip = on_error == "skip"
        self.skipped = 0
        self.first: DataError | None = None

    @contextmanager
    def tolerated(self) -> Iterator[None]:
        """Under "skip", swallow and count a DataError of the block."""
        try:
            yield
        except DataError as error:
            if not self.skip:
                raise
            self.skipped += 1
            self.first = self.first or error

    def __str__(self) -> str:
        if not self.skipped:
            return ""
        return f": {self.skipped} records or captions were skipped, the first because of: {self.first}"


def existing_file(path: str | Path) -> Path:
    """`path`, if it is a file; DataError otherwise."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return path


def existing_folder(path: str | Path | None, what: str) -> Path:
    """`path`, if it is a folder; DataError, naming the argument `what`, otherwise."""
    if path is None:
        raise DataError(f"this data set lies on disk: say where with {what}=")
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder (given as {what}=)")
    return path


def find_annotations(annotations: str | Path | None, root: str | Path | None, pattern: str) -> Path:
    """The annotation file: the one given, or the only one in `root` that matches `pattern`."""
    if annotations is not None:
        return existing_file(annotations)
    return find_only(existing_folder(root, "root"), pattern, "annotations")


def find_only(folder: Path, pattern: str, argument: str) -> Path:
    """The one file in `folder` that matches `pattern`; with none or several, a DataError asks for `argument`."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(f"{folder}: expected exactly one {pattern}, found {names}; name the file with {argument}=")
    return found[0]


def needed_splits(only: str | None, present: Collection[str]) -> tuple[str, ...]:
    """The splits to read so that `only` (None: all) can be made of those present: a missing val is a part of train."""
    if only is None:
        return SPLITS
    return (only,) if only == "test" or "val" in present else ("train", "val")


def splits_of(entries: list[Any]) -> set[str]:
    """The splits that the entries of an annotation file name."""
    given = (entry.get("split") for entry in entries if isinstance(entry, dict))
    return {SPLIT_OF[name] for name in given if isinstance(name, str) and name in SPLIT_OF}


def read_entries(path: Path) -> list[Any]:
    """The list under "images" of an annotation file, its entries not checked yet."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DataError(f'{path}: expected an object with a list "images" at the top')
    return content["images"]


def read_records(
    path: Path,
    entries: list[Any],
    problems: Problems,
    *,
    clean: Callable[[str], str],
    locate: Callable[[int, dict], Any],
    splits: Collection[str] = SPLITS,
    name_key: str = "filename",
    split: str | None = None,
) -> list[Record]:
    """Check the entries of `path` that belong to some splits and turn them into records.

    Args:
        path: the annotation file, for messages.
        entries: what `read_entries` returned.
        problems: decides what becomes of an entry that cannot be used.
        clean: applied to each raw caption.
        locate: (index, entry) -> source of the image; raises DataError where there is none.
        splits: entries of others are passed over.
        name_key: the key that holds the file name.
        split: the split of all entries; None takes it from each entry's key "split".
    """
    records = []
    first_with: dict[str, int] = {}
    for index, entry in enumerate(entries):
        with problems.tolerated():
            where = f"{path}: record {index}"
            file_name = _required(entry, name_key, str, where)
            name = (PurePath(str(entry.get("filepath") or "")) / file_name).as_posix()
            where = f"{where} ('{name}')"
            if name in first_with:
                raise DataError(f"{where}: the same image is already record {first_with[name]}")
            first_with[name] = index
            given = split or _required(entry, "split", str, where)
            if given not in SPLIT_OF:
                raise DataError(f"{where}: split '{given}' is not one of {', '.join(SPLIT_OF)}")
            if SPLIT_OF[given] not in splits:
                continue
            sentences = _required(entry, "sentences", list, where)
            captions = clean_captions(
                ((f"{where}, sentence {j}", sentence) for j, sentence in enumerate(sentences)),
                lambda at, sentence: clean(_required(sentence, "raw", str, at)),
                problems,
            )
            if not captions:
                raise DataError(f"{where}: the image has no captions")
            try:
                source = locate(index, entry)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            records.append(Record(name, SPLIT_OF[given], captions, source))
    return records


def clean_captions(
    raw: Iterator[tuple[str, Any]], clean: Callable[[str, Any], str], problems: Problems
) -> list[str]:
    """The cleaned captions of one image from pairs (where, raw caption); an empty one is a problem."""
    captions = []
    for where, caption in raw:
        with problems.tolerated():
            text = clean(where, caption)
            if not text:
                raise DataError(f"{where}: the caption is empty")
            captions.append(text)
    return captions


def _required(entry: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected an object, found {type(entry).__name__}")
    if key not in entry:
        raise DataError(f'{where}: the key "{key}" is missing (found: {", ".join(entry) or "none"})')
    if not isinstance(entry[key], kind):
        raise DataError(f'{where}: "{key}" must be a {kind.__name__}, found {type(entry[key]).__name__}')
    return entry[key]


def assemble(
    name: str,
    records: list[Record],
    open_images: Callable[[str, list[Any]], Images],
    problems: Problems,
    seed: int,
    *,
    needed: Collection[str] = SPLITS,
    image_kind: ImageKind = "pixels",
    feature_dim: int | None = None,
) -> DataSet:
    """Group records into the splits `needed`; `open_images(split, sources)` gives the images of one.

    Under "skip" every image is read once, so that those which cannot be decoded are left out too.
    Where train is needed, a missing val split is set aside from it, and one may do without test; another missing split
    is a DataError.
    """
    splits = {}
    for split in needed:
        chosen = [record for record in records if record.split == split]
        images = open_images(split, [record.source for record in chosen])
        if problems.skip:
            readable = _readable(images, f"checking {split}", problems)
            chosen, images = [chosen[i] for i in readable], Subset(images, readable)
        if chosen:
            captions = [record.captions for record in chosen]
            splits[split] = Split.from_lists(split, images, captions, [record.image_id for record in chosen])
        elif split == "test" and "train" in needed and not problems.skipped:
            warnings.warn(f"data set '{name}' has no test split: there will be no test", stacklevel=2)
        elif split != "val" or "train" not in needed:
            raise DataError(f"data set '{name}' has no usable image in its {split} split{problems}")
    if "val" in needed and "val" not in splits:
        splits["train"], splits["val"] = carve_validation(splits["train"], seed)
    if problems.skipped:
        warnings.warn(f"data set '{name}'{problems}", stacklevel=2)
    splits = dict.fromkeys(SPLITS) | splits
    return DataSet(name, **splits, image_kind=image_kind, feature_dim=feature_dim, skipped=problems.skipped)


def _readable(images: Images, title: str, problems: Problems) -> list[int]:
    readable = []
    for index in tqdm(range(len(images)), desc=title, unit="image", disable=None):
        with problems.tolerated():
            images[index]
            readable.append(index)
    return readable
