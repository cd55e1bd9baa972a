"""Encode every image and caption once, then rank: the protocol of Flickr30K and MS-COCO."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from esl_fast.data import ImageDataset, Split
from esl_fast.data.pairs import tokenize_all
from esl_fast.evaluation.metrics import mean_metrics, recall_metrics
from esl_fast.model import MatchingModel
from esl_fast.ops import retrieval_ranks, similarity

CAPTIONS_PER_IMAGE = 5  # that evaluation takes into account, where a data set has more
FOLDS, FOLD_IMAGES = 5, 1000
# Bytes of similarity computed at a time when the matrix is written to disk.
BLOCK_BYTES = 256 << 20


@dataclass
class Sides:
    """Both sides of a split's similarity, ``image (N, U) . text (M, U)``, and who owns which caption."""

    image: Tensor
    text: Tensor
    owners: Tensor

    def fold(self, start: int, stop: int) -> "Sides":
        """The images ``start..stop`` and their captions; owners are non-decreasing."""
        first, last = torch.searchsorted(self.owners, torch.tensor([start, stop], device=self.owners.device)).tolist()
        return Sides(self.image[start:stop], self.text[first:last], self.owners[first:last] - start)

    def metrics(self) -> dict[str, float]:
        return recall_metrics(*retrieval_ranks(self.image, self.text, self.owners))

    def save_similarity(self, path: Path) -> None:
        """The matrix ``(N, M)`` as float32 ``.npy``, block by block."""
        n, m = self.image.shape[0], self.text.shape[0]
        out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, m))
        block = max(1, BLOCK_BYTES // (4 * max(m, 1)))
        for start in range(0, n, block):
            out[start : start + block] = similarity(self.image[start : start + block], self.text).float().cpu().numpy()
        out.flush()


class Encoder:
    """Encodes one split with one or several models; pictures and tokens are prepared once and kept if they fit."""

    def __init__(self, split: Split, batch_size: int = 256, workers: int = 0, cache_bytes: int = 0) -> None:
        self.split = split.limit_captions(CAPTIONS_PER_IMAGE)
        self.batch_size, self.workers, self.cache_bytes = batch_size, workers, cache_bytes
        self._images: ImageDataset | None = None
        self._tokens: Tensor | None = None

    @torch.inference_mode()
    def encode(self, model: MatchingModel, precision: str = "fp32", progress: bool = True) -> Sides:
        """Sides of the split's similarity on the model's device; the model is left in evaluation mode."""
        model.eval()
        device = next(model.parameters()).device
        if self._images is None:
            self._images = ImageDataset(self.split, model.image_transform, self.cache_bytes)
            self._tokens = tokenize_all(self.split.captions, model.tokenize)
        loader = DataLoader(self._images, self.batch_size, num_workers=self.workers)
        features = []
        for name, batches, encode in (
            ("images", (images for images, _ in loader), model.encode_image),
            ("captions", (t.long() for t in self._tokens.split(self.batch_size)), model.encode_text),
        ):
            total = -(-(len(self.split) if name == "images" else len(self._tokens)) // self.batch_size)
            bar = tqdm(batches, f"encoding {name}", total, leave=False, disable=None if progress else True)
            with autocast(device, precision):
                features.append(torch.cat([encode(batch.to(device)).float() for batch in bar]))
        image, text = model.head.sides(*features)
        return Sides(image, text, torch.from_numpy(self.split.owners).to(device))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision by name: ``"fp32"`` (off), ``"bf16"`` or ``"fp16"``."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in dtypes:
        raise ValueError(f"precision is {precision!r}; accepted: {', '.join(map(repr, dtypes))}")
    return torch.autocast(device.type, dtypes[precision], enabled=precision != "fp32")


def evaluate(
    models: Sequence[Callable[[], MatchingModel]],
    split: Split,
    *,
    five_folds: bool = False,
    batch_size: int = 256,
    workers: int = 0,
    precision: str = "fp32",
    save_similarity: Path | None = None,
) -> dict:
    """Metrics of one model, or of the ensemble of several: their similarity matrices averaged.

    Args:
        models: functions that load a model each, called one after the other so that one is in memory at a time.
        split: what to evaluate on; the first five captions of each image count.
        five_folds: also average over folds of 1,000 images (COCO 1K).
        save_similarity: ``.npy`` file for the matrix ``(N, M)``.

    Returns:
        ``{"images", "captions", "metrics": {...}}`` and, with folds, ``"five_folds": {...}``.

    Raises:
        ValueError: non-finite features, naming the rows, or a split too small for folds.
    """
    if five_folds and len(split) < FOLDS * FOLD_IMAGES:
        raise ValueError(f"{FOLDS} folds take {FOLDS * FOLD_IMAGES} images; split {split.name!r} has {len(split)}")
    encoders: dict[str, Encoder] = {}
    parts = []
    for load in models:
        model = load()
        # Models that read the same input share what was prepared for it.
        key = json.dumps(model.config.clip, sort_keys=True, default=str)
        encoder = encoders.setdefault(key, Encoder(split, batch_size, workers))
        parts.append(encoder.encode(model, precision))
    # The mean of inner products is the inner product of the concatenations.
    sides = Sides(
        torch.cat([part.image / len(parts) for part in parts], 1) if len(parts) > 1 else parts[0].image,
        torch.cat([part.text for part in parts], 1) if len(parts) > 1 else parts[0].text,
        parts[0].owners,
    )
    result = {"images": len(sides.image), "captions": len(sides.text), "metrics": sides.metrics()}
    if five_folds:
        starts = range(0, FOLDS * FOLD_IMAGES, FOLD_IMAGES)
        result["five_folds"] = mean_metrics([sides.fold(start, start + FOLD_IMAGES).metrics() for start in starts])
    if save_similarity is not None:
        sides.save_similarity(save_similarity)
    return result
