"""A Karpathy file with one precomputed vector for each of its images."""

from pathlib import Path

from esl_fast.data.images import MappedArray
from esl_fast.data.karpathy import clean_plain
from esl_fast.data.records import (
    OnError,
    Problems,
    assemble,
    existing_folder,
    find_annotations,
    find_only,
    needed_splits,
    read_entries,
    read_records,
    splits_of,
)
from esl_fast.data.split import DataError, DataSet, Subset


def load_features(
    root: str | Path | None = None,
    *,
    annotations: str | Path | None = None,
    features: str | Path | None = None,
    on_error: OnError = "raise",
    seed: int = 0,
    only: str | None = None,
) -> DataSet:
    """Pooled features (N, F), row i of the .npy belonging to the i-th entry of `images`; memory-mapped.

    Both files may be named; else each must be the only `dataset*.json` and the only `*.npy` in `root`.
    """
    path = find_annotations(annotations, root, "dataset*.json")
    if features is None:
        features = find_only(existing_folder(path.parent if root is None else root, "root"), "*.npy", "features")
    array = MappedArray(Path(features), ndim=2)
    entries = read_entries(path)
    if len(array) != len(entries):
        raise DataError(f"{array.path}: {len(array)} rows, but {path} has {len(entries)} images; they must agree")
    problems = Problems(on_error)
    needed = needed_splits(only, splits_of(entries))
    records = read_records(path, entries, problems, clean=clean_plain, locate=lambda row, _: row, splits=needed)
    return assemble(
        "features",
        records,
        lambda _, rows: Subset(array, rows),
        problems,
        seed,
        needed=needed,
        image_kind="features",
        feature_dim=array.feature_dim,
    )
