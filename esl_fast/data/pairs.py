"""PyTorch data sets and the sampler of training and evaluation."""

import os
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate
from tqdm import tqdm

from esl_fast.data.split import Images, Split

TOKENIZE_BLOCK = 4096
CACHE_BYTES = 1 << 30

ImageTransform = Callable[[Image.Image], Tensor]


class ImageTensors(Dataset):
    """The images of a split as the float32 tensors a model reads.

    Pictures go through `transform`; arrays are converted as they are. Tensors that fit into `cache_bytes` together
    are all made at once and kept, which is sound because the official transform draws no random numbers; a random
    one needs `cache_bytes=0`.
    """

    def __init__(self, images: Images, transform: ImageTransform | None, cache_bytes: int = CACHE_BYTES):
        self.images = images
        self.transform = transform
        self._cache: Tensor | None = None
        if transform is None and isinstance(images[0], Image.Image):
            raise ValueError("pictures need an image_transform that turns them into tensors")
        first = self[0]
        if first.nbytes * len(images) <= cache_bytes:
            cache = torch.empty(len(images), *first.shape)
            for index in tqdm(range(len(images)), desc="reading images", unit="image", leave=False, disable=None):
                cache[index] = self[index]
            self._cache = cache

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        if self._cache is not None:
            return self._cache[index]
        image = self.images[index]
        if isinstance(image, np.ndarray):
            return torch.from_numpy(image.astype(np.float32))
        return self.transform(image).float()

    def batch(self, indices: np.ndarray) -> Tensor:
        """The images at `indices`, stacked."""
        if self._cache is not None:
            return self._cache[torch.from_numpy(indices)]
        return torch.stack([self[int(index)] for index in indices])


def affordable_workers(wanted: int) -> int:
    """At most as many processes as there are CPUs for them."""
    return min(wanted, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def tokenize_all(captions: list[str], tokenize: Callable[[list[str]], Tensor]) -> Tensor:
    """Tokens of all captions, int32 (M, T); `tokenize` must give every block of captions the same T."""
    starts = range(0, len(captions), TOKENIZE_BLOCK)
    blocks = [
        tokenize(captions[start : start + TOKENIZE_BLOCK]).int()
        for start in tqdm(starts, desc="tokenizing", unit="block", disable=True if len(captions) <= 20_000 else None)
    ]
    return torch.cat(blocks)


def tokenized(split: Split, tokenize: Callable[[list[str]], Tensor]) -> Tensor:
    """Tokens of a split's captions, kept with it: the same tokenizer is not asked twice."""
    if split.tokenized is None or split.tokenized[0] is not tokenize:
        split.tokenized = (tokenize, tokenize_all(split.captions, tokenize))
    return split.tokenized[1]


class PairDataset(Dataset):
    """The (image, caption) pairs of a split, one for each caption.

    Item j is a dict of `image` (float32 tensor), `tokens` (int64 (T,)), `image_index` and `caption_index` (ints).

    Args:
        split: the images and captions.
        image_transform: picture -> tensor, such as open_clip's preprocessing; not used for feature arrays.
        tokenize: list of n captions -> integer tensor (n, T); see `tokenized`.
        cache_bytes: see `ImageTensors`.

    Attributes:
        augment: item -> item, called on each access; it must not write into the tensors it is given. None: items as
            they are.
    """

    def __init__(
        self,
        split: Split,
        image_transform: ImageTransform | None,
        tokenize: Callable[[list[str]], Tensor],
        cache_bytes: int = CACHE_BYTES,
    ):
        self.images = ImageTensors(split.images, image_transform, cache_bytes)
        self.tokens = tokenized(split, tokenize)
        self.owners = split.owners
        self.augment: Callable[[dict], dict] | None = None

    def __len__(self) -> int:
        return len(self.owners)

    def __getitem__(self, index: int) -> dict:
        owner = int(self.owners[index])
        item = {
            "image": self.images[owner],
            "tokens": self.tokens[index].long(),
            "image_index": owner,
            "caption_index": index,
        }
        return item if self.augment is None else self.augment(item)

    def __getitems__(self, indices: list[int]) -> dict | list[dict]:
        """What a DataLoader asks for a batch: without `augment` it is taken at once, already collated."""
        if self.augment is not None:
            return [self[index] for index in indices]
        owners = self.owners[indices]
        return {
            "image": self.images.batch(owners),
            "tokens": self.tokens[indices].long(),
            "image_index": torch.from_numpy(owners),
            "caption_index": torch.tensor(indices),
        }

    @staticmethod
    def collate(batch: dict | list[dict]) -> dict:
        """`collate_fn` for a DataLoader over this data set."""
        return batch if isinstance(batch, dict) else default_collate(batch)


class EpochSampler(Sampler[int]):
    """The order of one epoch, a function of (seed, epoch) alone, so that a run can resume in the middle of it.

    Args:
        num_items: length of the data set.
        seed: of the whole run.
        epoch: counted from 0.
        start: how many items have already been consumed in this epoch.
    """

    def __init__(self, num_items: int, seed: int, epoch: int, start: int = 0):
        if not 0 <= start <= num_items:
            raise ValueError(f"start must be in 0..{num_items}, got {start}")
        self.num_items, self.seed, self.epoch, self.start = num_items, seed, epoch, start

    def __len__(self) -> int:
        return self.num_items - self.start

    def __iter__(self) -> Iterator[int]:
        # mixed, so that (seed, epoch + 1) is not (seed + 1, epoch)
        state = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)
        order = torch.randperm(self.num_items, generator=torch.Generator().manual_seed(int(state[0])))
        return iter(order[self.start :].tolist())
