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

from esl_fast.data import ImageTensors, Split
from esl_fast.data.pairs import affordable_workers, tokenize_all
from esl_fast.evaluation.combined import mean_scores, reranked
from esl_fast.evaluation.metrics import chance_rsum, mean_metrics, recall_metrics
from esl_fast.model import MatchingModel, RegionWordHead
from esl_fast.model.scores import InnerProducts, Scores
from esl_fast.model.sequences import Features, Sequences, concatenate, vectors_of
from esl_fast.ops import checks

CAPTIONS_PER_IMAGE = 5  # that evaluation takes into account, where a data set has more
FOLDS, FOLD_IMAGES = 5, 1000


@dataclass
class SplitScores:
    """Similarity of a split's images and captions, and who owns which caption."""

    scores: Scores
    owners: Tensor

    def fold(self, start: int, stop: int) -> "SplitScores":
        """The images ``start..stop`` and their captions; owners are non-decreasing."""
        first, last = torch.searchsorted(self.owners, torch.tensor([start, stop], device=self.owners.device)).tolist()
        return SplitScores(self.scores.part(slice(start, stop), slice(first, last)), self.owners[first:last] - start)

    @torch.inference_mode()
    def metrics(self) -> dict[str, float]:
        return recall_metrics(*self.scores.ranks(self.owners))

    @torch.inference_mode()
    def save_similarity(self, path: Path) -> None:
        """The matrix ``(N, M)`` as float32 ``.npy``, block by block."""
        out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=self.scores.shape)
        for images, captions, scores in self.scores.blocks():
            out[images, captions] = scores.float().cpu().numpy()
        out.flush()


class Encoder:
    """Encodes one split with one or several models: tokens are made once, pictures kept if they fit `cache_bytes`."""

    def __init__(self, split: Split, batch_size: int = 256, workers: int = 0, cache_bytes: int = 0) -> None:
        self.split = split.limit_captions(CAPTIONS_PER_IMAGE)
        self.batch_size, self.cache_bytes = batch_size, cache_bytes
        self.workers = affordable_workers(workers)
        self._images: ImageTensors | None = None
        self._tokens: Tensor | None = None

    @torch.inference_mode()
    def encode(self, model: MatchingModel, precision: str = "fp32") -> SplitScores:
        """The split's similarity on the model's device; the model is left in evaluation mode."""
        return self.score(model, self.features(model, precision))

    @torch.inference_mode()
    def score(self, model: MatchingModel, features: tuple[Features, Features]) -> SplitScores:
        """The split's similarity from what :meth:`features` gave."""
        owners = torch.from_numpy(self.split.owners).to(vectors_of(features[0]).device)
        scores = model.head.scores(*features)
        scores.check_finite()
        return SplitScores(scores, owners)

    @torch.inference_mode()
    def features(self, model: MatchingModel, precision: str = "fp32") -> tuple[Features, Features]:
        """What the model's head takes of all images and captions, on the model's device."""
        model.eval()
        device = next(model.parameters()).device
        if self._images is None:
            self._images = ImageTensors(self.split.images, model.image_transform, self.cache_bytes)
            self._tokens = tokenize_all(self.split.captions, model.tokenize)
        # A generator of its own: training goes on with the same random numbers however often it is evaluated.
        loader = DataLoader(self._images, self.batch_size, num_workers=self.workers, generator=torch.Generator())
        features = []
        for name, batches, encode in (
            ("images", loader, model.encode_image),
            ("captions", (model.trim(t.long()) for t in self._tokens.split(self.batch_size)), model.encode_text),
        ):
            total = -(-(len(self.split) if name == "images" else len(self._tokens)) // self.batch_size)
            bar = tqdm(batches, f"encoding {name}", total, leave=False, disable=None)
            with autocast(device, precision):
                features.append(concatenate([encode(batch.to(device)).float() for batch in bar]))
            if not isinstance(features[-1], Sequences):
                checks.finite(f"features of {name}", features[-1], wait=True)
        return features[0], features[1]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision by name: ``"fp32"`` (off), ``"bf16"`` or ``"fp16"``."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    checks.one_of("precision", precision, dtypes)
    return torch.autocast(device.type, dtypes[precision], enabled=precision != "fp32")


def names_file(matrix: Path) -> Path:
    """Where the names of a saved matrix's rows and columns go: ``s.names.json`` beside ``s.npy``."""
    return Path(f"{str(matrix).removesuffix('.npy')}.names.json")


def evaluate(
    models: Sequence[Callable[[], MatchingModel]],
    split: Split,
    *,
    five_folds: bool = False,
    batch_size: int = 256,
    workers: int = 0,
    precision: str = "fp32",
    save_similarity: Path | None = None,
    rerank: int | None = None,
    shortlist: Callable[[], MatchingModel] | None = None,
) -> dict:
    """Metrics of one model, or of the ensemble of several: their similarity matrices averaged.

    Args:
        models: functions that load a model each, called one after the other so that one is in memory at a time (two
            where one makes shortlists).
        split: what to evaluate on; the first five captions of each image count.
        five_folds: also average over folds of 1,000 images (COCO 1K).
        save_similarity: ``.npy`` file for the matrix ``(N, M)``; :func:`names_file` beside it says of which images
            and captions, and which image owns each caption.
        rerank: two-stage retrieval with one region-word model: a global similarity finds so many candidates a query,
            the model sorts them.
        shortlist: loads the model of the first stage; without it, the cosine of the re-ranking model's mean vectors.

    Returns:
        ``{"images", "captions", "metrics": {...}, "chance_rsum"}`` and, with folds, ``"five_folds": {...}``.

    Raises:
        ValueError: non-finite features, naming the rows, a split too small for folds, or models that cannot re-rank.
    """
    if rerank is not None and (len(models) > 1 or save_similarity is not None):
        raise ValueError("rerank takes one model and makes an order, no matrix to save")
    if five_folds and len(split) < FOLDS * FOLD_IMAGES:
        raise ValueError(f"{FOLDS} folds take {FOLDS * FOLD_IMAGES} images; split {split.name!r} has {len(split)}")
    encoders: dict[str, Encoder] = {}

    def encoder_of(model: MatchingModel) -> Encoder:
        # Models that read the same input share its tokens.
        config = model.config
        key = json.dumps((config.text_tower, config.clip, config.bert), sort_keys=True, default=str)
        return encoders.setdefault(key, Encoder(split, batch_size, workers))

    parts = []
    for load in models:
        model = load()
        if rerank is not None and not isinstance(model.head, RegionWordHead):
            raise ValueError("rerank sorts by regions and words; this checkpoint's similarity is a global one")
        encoder = encoder_of(model)
        features = encoder.features(model, precision)
        parts.append(encoder.score(model, features))
        if rerank is not None:
            first = _shortlist(features, shortlist, encoder_of, precision)
            parts[-1].scores = reranked(parts[-1].scores, first, rerank)
        del model
    sides = SplitScores(mean_scores([part.scores for part in parts]), parts[0].owners)
    images, captions = sides.scores.shape
    result = {
        "images": images,
        "captions": captions,
        "metrics": sides.metrics(),
        "chance_rsum": chance_rsum(sides.owners.cpu()),
    }
    if five_folds:
        starts = range(0, FOLDS * FOLD_IMAGES, FOLD_IMAGES)
        result["five_folds"] = mean_metrics([sides.fold(start, start + FOLD_IMAGES).metrics() for start in starts])
    if save_similarity is not None:
        sides.save_similarity(save_similarity)
        known = encoder.split  # each image with the captions that count
        names = {"images": [*map(str, known.image_ids)], "captions": known.captions, "owners": known.owners.tolist()}
        names_file(save_similarity).write_text(json.dumps(names))
    return result


@torch.inference_mode()
def _shortlist(
    features: tuple[Features, Features],
    load: Callable[[], MatchingModel] | None,
    encoder_of: Callable[[MatchingModel], Encoder],
    precision: str,
) -> Scores:
    """A model's similarity or, without one, the cosine of mean vectors."""
    if load is not None:
        model = load()
        return encoder_of(model).encode(model, precision).scores
    means = (side.mean() if isinstance(side, Sequences) else side for side in features)
    return InnerProducts(*(torch.nn.functional.normalize(mean, dim=-1) for mean in means))
