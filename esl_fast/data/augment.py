"""Size augmentation of region-word training: regions are dropped, words masked, replaced or deleted."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esl_fast.model.sequences import SpecialTokens

# Of the words that are drawn: shares that are masked and replaced; the others are deleted.
MASKED, REPLACED = 0.5, 0.1


class SizeAugmentation:
    """Item -> item, a function of (seed, epoch, caption) alone, so that a resumed run repeats it.

    Each region is dropped, and each word masked, replaced by another or deleted, with `probability`; one region and one
    word always remain. Kept regions move to the front of the array, and `image_lengths` counts them.

    Args:
        tokens: those of the training set (M, T); replacements are drawn from the words in it.
        special: ids that are no words.
        starts: of consecutive token ids, which begin a word; the pieces of a word share its fate.
    """

    def __init__(
        self,
        tokens: Tensor,
        special: SpecialTokens,
        starts: Callable[[np.ndarray], np.ndarray],
        seed: int,
        probability: float = 0.2,
    ):
        if not 0 < probability < 1:
            raise ValueError(f"probability must lie between 0 and 1, got {probability}")
        words = np.unique(tokens.numpy())
        self.words = words[~np.isin(words, (0, *special))]
        self.special, self.starts, self.seed, self.probability = special, starts, seed, probability
        self.epoch = 0

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, self.epoch, item["caption_index"]))
        changed = {"tokens": self._change_words(item["tokens"], rng)}
        if item["image"].ndim == 2:
            changed["image"], changed["image_lengths"] = self._drop_regions(item["image"], rng)
        return item | changed

    def _change_words(self, tokens: Tensor, rng: np.random.Generator) -> Tensor:
        ids = tokens.numpy()
        pieces = ids[1 : int((ids == self.special.end).argmax())]
        if not len(pieces) or not len(self.words):
            return tokens
        starts = self.starts(pieces)
        starts[0] = True
        word = starts.cumsum() - 1
        fate = (rng.random(word[-1] + 1) / self.probability)[word]
        other = self.words[rng.integers(len(self.words), size=len(pieces))]
        pieces = np.where(fate < MASKED, self.special.mask, np.where(fate < MASKED + REPLACED, other, pieces))
        kept = (fate < MASKED + REPLACED) | (fate >= 1)
        if not kept.any():
            kept = word == 0
        pieces = pieces[kept]
        changed = np.zeros_like(ids)
        changed[: len(pieces) + 2] = (ids[0], *pieces, self.special.end)
        return torch.from_numpy(changed)

    def _drop_regions(self, regions: Tensor, rng: np.random.Generator) -> tuple[Tensor, int]:
        kept = rng.random(len(regions)) >= self.probability
        kept[0] |= not kept.any()
        count = int(kept.sum())
        left = torch.zeros_like(regions)
        left[:count] = regions[torch.from_numpy(kept)]
        return left, count
