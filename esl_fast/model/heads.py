"""Similarity heads: from features of both sides to scores."""

import math
from collections.abc import Callable
from itertools import accumulate, islice

import torch
from torch import Tensor, nn

from esl_fast import ops
from esl_fast._eager import is_exporting
from esl_fast.model import official
from esl_fast.model.parts import Contribution, LevelHead, is_plain, replaced, tensors_of
from esl_fast.model.region_word import RegionWordHead
from esl_fast.model.scores import InnerProducts

# Methods of a head that somebody may replace on the object.
REPLACEABLE = ("fold", "image_units", "scores", "sides", "text_units", "block_units")


class Head(nn.Module):
    """A similarity that is an inner product of two derived vectors, ``image_units . fold(text_units)``.

    Subclasses say what the units are and how a side is folded; whatever consumes a similarity (loss, ranks,
    top k) takes the two sides that :meth:`sides` gives and never needs to know which head they came from.
    """

    embed_dim: int
    takes_sequences = False

    @property
    def plain(self) -> bool:
        """Whether nobody observes or replaces calls of its parts: then they may be worked around."""
        own = type(self)
        return own.sides is Head.sides and own.scores is Head.scores and not replaced(self, REPLACEABLE)

    def image_units(self, x: Tensor) -> Tensor:
        """Units ``(N, U)`` of image features ``(N, d)``."""
        raise NotImplementedError

    def text_units(self, y: Tensor) -> Tensor:
        """Units ``(M, U)`` of text features ``(M, d)``."""
        raise NotImplementedError

    def block_units(self, side: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """What makes units of block after block of a side's features, on a CPU without gradients.

        It may look at weights once and need not check features.
        """
        return self.image_units if side == "image" else self.text_units

    def fold(self, units: Tensor, side: str) -> Tensor:
        """Units of ``side`` (``"image"`` or ``"text"``) with the contributions folded in."""
        raise NotImplementedError

    def sides(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """The two vectors an item whose inner product is the similarity; the smaller side carries the folding.

        Features as in :meth:`forward`, which also says what is raised.
        """
        self._check(image_features, text_features)
        ops.checks.finite("image_features", image_features)
        ops.checks.finite("text_features", text_features)
        return self._sides(image_features, text_features)

    def _sides(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`sides`, of features that were checked."""
        if image_features.dtype != text_features.dtype:
            common = torch.promote_types(image_features.dtype, text_features.dtype)
            image_features, text_features = image_features.to(common), text_features.to(common)
        image_units, text_units = self.image_units(image_features), self.text_units(text_features)
        # What is exported has to serve all sizes.
        if not is_exporting() and image_units.shape[0] < text_units.shape[0]:
            return self.fold(image_units, "image"), text_units
        return image_units, self.fold(text_units, "text")

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Similarity ``(N, M)`` of image features ``(N, d)`` and text features ``(M, d)``.

        Features as they come from the towers (not normalised), any float dtype; the result has their dtype. Raises
        TypeError or ValueError for integer tensors, wrong sizes, different devices and (on a CPU) non-finite features.
        """
        if not (self.plain and ops.streams(image_features, text_features)):
            return self.scores(image_features, text_features).matrix()
        self._check(image_features, text_features)
        dtype = torch.promote_types(image_features.dtype, text_features.dtype)
        features = {"image": image_features.to(dtype), "text": text_features.to(dtype)}
        smaller, larger = ("image", "text") if len(image_features) < len(text_features) else ("text", "image")
        folded = self.fold(self.block_units(smaller, dtype)(features[smaller]), smaller)
        scores = ops.streamed_similarity(folded, features[larger], self.block_units(larger, dtype), folded_side=smaller)
        # A feature that is not finite shows in every score of its item, which takes no pass over the features.
        if scores.numel() == 0 or not math.isfinite(scores[0].sum() + scores[:, 0].sum()):
            for side, rows in features.items():
                ops.checks.finite(f"{side}_features", rows)
        return scores

    def scores(self, image_features: Tensor, text_features: Tensor) -> InnerProducts:
        """The similarity of features, for whatever consumes it; see :meth:`forward`."""
        return InnerProducts(*self.sides(image_features, text_features))

    def _check(self, image_features: Tensor, text_features: Tensor) -> None:
        """Everything but the values."""
        ops.checks.matrix("image_features", image_features, self.embed_dim)
        ops.checks.matrix("text_features", text_features, self.embed_dim)
        ops.checks.same_device(
            image_features=image_features, text_features=text_features, **dict(islice(self.named_parameters(), 1))
        )


class ESLHead(LevelHead, Head):
    """ESL over one embedding an image and one a caption (the global variant).

    ``S[i, j] = (1 / (L+1)) * sum_k degree_k * x_k(i)^T D_k y_k(j)`` over levels k = 0..L. A feature of zeros has no
    direction: its scores are NaN.

    Args:
        embed_dim: d, the width of the features on both sides.
        kernel_size: s, each level has ``floor(1/s)`` of its predecessor's units.
        num_levels: L, levels beyond the embedding itself.
        aggregator: ``"heuristic"`` (a learned filter a level) or ``"adaptive"`` (a learned sparse matrix a level).

    Raises:
        ValueError: sizes that leave a level without units.
    """

    layout = official.GLOBAL
    normalize = True

    def make_contribution(self) -> Contribution:
        return Contribution(self.dims)

    def image_units(self, x: Tensor) -> Tensor:
        return self.image(x)

    def text_units(self, y: Tensor) -> Tensor:
        return self.text(y)

    def _sides(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        # One step keeps autograd's graph small. Without one the parts do better: they keep what they make of weights.
        if not (self.plain and torch.is_grad_enabled() and self.num_levels):
            return super()._sides(image_features, text_features)
        image, text, contribution = self.image, self.text, self.contribution
        degrees = contribution.w, contribution.temp_scale_1, contribution.temp_scale_2
        matrices = tensors_of(contribution.matrices)
        parameters = [*image.tensors(), *text.tensors(), *degrees, *matrices]
        grad = any(tensor.requires_grad for tensor in (image_features, text_features, *parameters))
        if not grad or not ops.in_one_step(image_features, text_features, self.embed_dim, parameters, self._shapes):
            return super()._sides(image_features, text_features)
        for part in (image, text, contribution):
            part.forget()
        (image_weights, _), (text_weights, _) = image.levels(), text.levels()
        return ops.sides(
            image_features,
            text_features,
            (image_weights, text_weights),
            degrees,
            matrices,
            chains=(image.chain, text.chain),
            normalize=self.normalize,
        )

    def block_units(self, side: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        return (self.image if side == "image" else self.text).block_units(dtype)

    @property
    def plain(self) -> bool:
        parts = self.image, self.text, self.contribution
        return type(self) is ESLHead and not replaced(self, REPLACEABLE) and all(map(is_plain, parts))

    def fold(self, units: Tensor, side: str) -> Tensor:
        return self.contribution(units, side)

    def narrowed(self, tolerance: float) -> "NarrowedHead":
        """This head, for inference, without the levels that hardly count: a narrower product.

        The levels of the smallest proven bounds are left out, as many as have bounds that add up to ``tolerance`` at
        most; the result's ``bound`` is their sum, and no similarity of exact arithmetic changes by more. Looks at the
        weights as they are now, once, which waits for a GPU. Raises ValueError for a negative tolerance or weights that
        are not finite, TypeError for a head whose units or folding are not an ESLHead's.
        """
        own = [name for name in REPLACEABLE if getattr(type(self), name) is not getattr(ESLHead, name)]
        own += replaced(self, REPLACEABLE)
        if own:
            name = type(self).__name__
            raise TypeError(f"levels of an ESLHead can be left out; this {name} has its own {own[0]}")
        if not ops.checks.number("tolerance", tolerance) >= 0:
            raise ValueError(f"tolerance is {tolerance}; expected a number of at least 0")
        for name, weight in self.named_parameters():
            ops.checks.finite(name, torch.atleast_1d(weight), wait=True)
        bounds = self.contribution.bounds()
        ops.checks.finite("bounds of levels", bounds[:, None], wait=True)  # degrees may overflow
        bounds = bounds.tolist()
        dropped, total = [], 0.0
        for level in sorted(range(len(bounds)), key=bounds.__getitem__)[:-1]:
            if total + bounds[level] > tolerance:
                break
            dropped.append(level)
            total += bounds[level]
        return NarrowedHead(self, [level for level in range(len(bounds)) if level not in dropped], total)


class NarrowedHead(Head):
    """Some levels of an :class:`ESLHead`; made by :meth:`ESLHead.narrowed`.

    Attributes:
        levels: those kept, ascending.
        bound: how far a similarity can be from the whole head's.
    """

    def __init__(self, head: ESLHead, levels: list[int], bound: float) -> None:
        super().__init__()
        self.whole, self.levels, self.bound, self.embed_dim = head, levels, bound, head.embed_dim
        ends = [0, *accumulate(head.dims)]
        spans = [(ends[level], ends[level + 1]) for level in levels]
        # Neighbouring levels stay one slice, which needs no copy.
        self._spans = [spans[0]]
        for start, stop in spans[1:]:
            if start == self._spans[-1][1]:
                self._spans[-1] = (self._spans[-1][0], stop)
            else:
                self._spans.append((start, stop))

    def _kept(self, units: Tensor) -> Tensor:
        parts = [units[:, start:stop] for start, stop in self._spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def image_units(self, x: Tensor) -> Tensor:
        return self._kept(self.whole.image(x, self.levels[-1]))

    def text_units(self, y: Tensor) -> Tensor:
        return self._kept(self.whole.text(y, self.levels[-1]))

    @property
    def plain(self) -> bool:
        return super().plain and self.whole.plain

    def fold(self, units: Tensor, side: str) -> Tensor:
        return self.whole.contribution(units, side, self.levels)


class CosineHead(Head):
    """Plain cosine similarity: the baseline, behind the same interface."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim

    def image_units(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)

    text_units = image_units

    def fold(self, units: Tensor, side: str) -> Tensor:
        return units


def similarity(
    image_features: Tensor, text_features: Tensor, head: Head, *, tolerance: float | None = None
) -> Tensor | tuple[Tensor, float]:
    """Similarity ``(N, M)`` of features ``(N, d)`` and ``(M, d)``, for someone who owns a model.

    With ``tolerance`` (inference), levels that provably add less are left out, and the result is the similarity and
    the bound on what that changed (see :meth:`ESLHead.narrowed`).
    """
    if not callable(head):
        raise TypeError(f"head is a {type(head).__name__}; expected an ESLHead or another head")
    if tolerance is None:
        return head(image_features, text_features)
    if not isinstance(head, ESLHead):
        raise TypeError(f"tolerance leaves levels out of an ESLHead; head is a {type(head).__name__}")
    narrowed = head.narrowed(tolerance)
    with torch.no_grad():
        return narrowed(image_features, text_features), narrowed.bound


SIMILARITIES = ("esl-heuristic", "esl-adaptive", "cosine")
REGION_WORD_SIMILARITIES = ("region-word-heuristic", "region-word-adaptive")


def make_head(similarity: str, embed_dim: int, kernel_size: int = 2, num_levels: int = 8) -> Head | RegionWordHead:
    """Head by the name that the training script uses."""
    ops.checks.one_of("similarity", similarity, SIMILARITIES + REGION_WORD_SIMILARITIES)
    if similarity == "cosine":
        return CosineHead(embed_dim)
    variant, _, aggregator = similarity.rpartition("-")
    return {"esl": ESLHead, "region-word": RegionWordHead}[variant](embed_dim, kernel_size, num_levels, aggregator)
