"""Captioned image sets: readers, a drawn demo set, and the data sets and sampler that feed training."""

import inspect
from pathlib import Path
from typing import Any

from esl_fast.data.augment import SizeAugmentation
from esl_fast.data.coco import load_coco
from esl_fast.data.features import load_features
from esl_fast.data.karpathy import load_flickr30k, load_karpathy
from esl_fast.data.pairs import EpochSampler, ImageTensors, PairDataset
from esl_fast.data.records import SPLITS, OnError
from esl_fast.data.regions import load_regions
from esl_fast.data.split import DataError, DataSet, Split
from esl_fast.data.synthetic import load_synthetic

__all__ = [
    "LOADERS",
    "DataError",
    "DataSet",
    "EpochSampler",
    "ImageTensors",
    "PairDataset",
    "SizeAugmentation",
    "Split",
    "load_dataset",
]

LOADERS = {
    "synthetic": load_synthetic,
    "flickr30k": load_flickr30k,
    "coco": load_coco,
    "karpathy": load_karpathy,
    "features": load_features,
    "regions": load_regions,
}


def load_dataset(
    name: str,
    root: str | Path | None = None,
    *,
    image_root: str | Path | None = None,
    annotations: str | Path | None = None,
    features: str | Path | None = None,
    on_error: OnError = "raise",
    seed: int = 0,
    size: tuple[int, int, int] | None = None,
    image_size: int | None = None,
    only: str | None = None,
) -> DataSet:
    """Load a data set by name.

    Args:
        name: a key of `LOADERS`.
        root: folder of the data set; all sets but `synthetic` lie on disk.
        image_root: folder of the images, where it is not the usual one in `root` (flickr30k, coco, karpathy).
        annotations: annotation file, where it is not the usual one in `root` (flickr30k, coco, karpathy, features).
        features: the .npy file, where `root` has not just one (features).
        on_error: "raise" stops at the first record that cannot be used; "skip" reads every image once, leaves out
            what cannot be used, and warns with the number.
        seed: of the drawn images (synthetic), and of the val split set aside from train where there is none.
        size: number of train, val and test images (synthetic).
        image_size: side of the images in pixels (synthetic).
        only: "train", "val" or "test": of a set on disk only this split is read, and need be there.

    Raises:
        DataError: naming the file, the record, what was found and what is accepted.
    """
    if name not in LOADERS:
        raise DataError(f"unknown data set '{name}'; known are {', '.join(LOADERS)}")
    if on_error not in ("raise", "skip"):
        raise DataError(f"on_error must be 'raise' or 'skip', got '{on_error}'")
    if only not in (None, *SPLITS):
        raise DataError(f"only must be None or one of {', '.join(SPLITS)}, got '{only}'")
    options: dict[str, Any] = {
        "root": root,
        "image_root": image_root,
        "annotations": annotations,
        "features": features,
        "size": size,
        "image_size": image_size,
    }
    given = {option: value for option, value in options.items() if value is not None}
    loader = LOADERS[name]
    accepted = inspect.signature(loader).parameters
    for option in given:
        if option not in accepted:
            raise DataError(f"{option}= is given, but data set '{name}' takes none")
    given |= {name: value for name, value in (("on_error", on_error), ("only", only)) if name in accepted}
    return loader(seed=seed, **given)
