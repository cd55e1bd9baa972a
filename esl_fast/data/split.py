"""What every loader returns: three splits of images and the captions that belong to them."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal, Protocol

import numpy as np
from PIL import Image

ImageKind = Literal["pixels", "features", "regions"]


class DataError(ValueError):
    """A problem with the data that its owner can mend; the message names the file and the record."""


class Images(Protocol):
    """Anything with a length whose items are RGB pictures or arrays of shape (F,) or (R, F)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Image.Image | np.ndarray: ...


class Subset:
    """Chosen items of `images`, in the order of `indices`."""

    def __init__(self, images: Images, indices: Sequence[int]):
        self.images = images
        self.indices = np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Image.Image | np.ndarray:
        return self.images[int(self.indices[index])]


@dataclass
class Split:
    """One split of a captioned image set: N images and M captions.

    Attributes:
        name: "train", "val" or "test".
        images: N items, each an RGB `PIL.Image.Image` or an array of shape (F,) or (R, F) in its stored dtype.
        captions: M cleaned captions.
        owners: int64 (M,), the image of each caption; non-decreasing, and every image owns at least one caption.
        image_ids: N stable names, for listings.
        tokenized: a tokenizer and what it made of the captions, once `pairs.tokenized` was asked.
    """

    name: str
    images: Images
    captions: list[str]
    owners: np.ndarray
    image_ids: list[str]
    tokenized: tuple | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.owners = np.asarray(self.owners, dtype=np.int64)
        if len(self.image_ids) != len(self.images):
            raise DataError(f"split '{self.name}': {len(self.images)} images but {len(self.image_ids)} image ids")
        if len(self.owners) != len(self.captions):
            raise DataError(f"split '{self.name}': {len(self.captions)} captions but {len(self.owners)} owners")
        if (np.diff(self.owners) < 0).any() or not np.array_equal(np.unique(self.owners), np.arange(len(self.images))):
            raise DataError(
                f"split '{self.name}': owners must be non-decreasing and name each of the {len(self.images)} images"
            )

    @classmethod
    def from_lists(cls, name: str, images: Images, captions: Sequence[Sequence[str]], image_ids: list[str]) -> "Split":
        """A split from one list of captions for each image."""
        owners = np.repeat(np.arange(len(captions)), [len(of_one) for of_one in captions])
        return cls(name, images, [text for of_one in captions for text in of_one], owners, image_ids)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)

    def limit_captions(self, k: int) -> "Split":
        """The same images with the first `k` captions of each (all of them where there are fewer)."""
        if k < 1:
            raise ValueError(f"an image needs at least one caption, limit_captions was given {k}")
        kept = np.flatnonzero(np.arange(len(self.owners)) - np.searchsorted(self.owners, self.owners) < k)
        return Split(self.name, self.images, [self.captions[j] for j in kept], self.owners[kept], self.image_ids)

    def subset(self, image_indices: Sequence[int]) -> "Split":
        """The images at `image_indices`, in that order, with their captions."""
        bounds = np.searchsorted(self.owners, np.arange(len(self) + 1))
        captions = [self.captions[bounds[i] : bounds[i + 1]] for i in image_indices]
        ids = [self.image_ids[i] for i in image_indices]
        return Split.from_lists(self.name, Subset(self.images, image_indices), captions, ids)


@dataclass
class DataSet:
    """The splits of one data set; no image is in two of them.

    Attributes:
        name: as given to `load_dataset`.
        train, val, test: the splits; None where only another one was asked for; a set may lack test.
        image_kind: "pixels" (pictures), "features" (one vector an image) or "regions" (R vectors an image).
        feature_dim: F of features and regions, None for pixels.
        skipped: records and captions left out because they could not be used (`on_error="skip"`).

    Raises:
        DataError: an image id is in two splits.
    """

    name: str
    train: Split | None
    val: Split | None
    test: Split | None
    image_kind: ImageKind
    feature_dim: int | None = None
    skipped: int = 0

    def __post_init__(self) -> None:
        splits = [split for split in (self.train, self.val, self.test) if split is not None]
        for first, second in combinations(splits, 2):
            shared = set(first.image_ids) & set(second.image_ids)
            if shared:
                raise DataError(
                    f"data set '{self.name}': {len(shared)} images are in both '{first.name}' and '{second.name}', "
                    f"among them '{min(shared)}'; the splits must share no image"
                )


def carve_validation(train: Split, seed: int) -> tuple[Split, Split]:
    """Train and val from a `train` that came without a val: val is a seeded tenth, at most 1,000 images.

    The test split is never used in its place: selecting checkpoints on it would make its scores meaningless.
    """
    if len(train) < 2:
        raise DataError("there is no val split and train has fewer than two images, so none can be set aside")
    # RandomState, because its streams are the same in every version of numpy
    order = np.random.RandomState(seed).permutation(len(train))
    size = min(1000, max(1, len(train) // 10))
    warnings.warn(f"no val split: {size} of the {len(train)} train images (seed {seed}) are used for it", stacklevel=2)
    val = train.subset(np.sort(order[:size]))
    val.name = "val"
    return train.subset(np.sort(order[size:])), val
