"""What ESL heads are made of: one aggregator a modality, one set of contributions."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from esl_fast import ops
from esl_fast._eager import is_eager
from esl_fast.model import official
from esl_fast.reference.aggregate import level_dims
from esl_fast.reference.contribution import normed_matrix

AGGREGATORS = ("heuristic", "adaptive")
# What the next level reads on each side (see ops.aggregate).
CHAIN = {"image": "normalized", "text": "raw"}
CHANNELS = 4  # of a heuristic level's convolution; they act as their sum


def check_levels(embed_dim: int, kernel_size: int, num_levels: int, aggregator: str) -> list[int]:
    """Sizes of all levels; one clear ValueError for sizes that the definition does not allow."""
    ops.checks.one_of("aggregator", aggregator, AGGREGATORS)
    sizes = (("embed_dim", embed_dim, 1), ("kernel_size", kernel_size, 1), ("num_levels", num_levels, 0))
    for name, value, least in sizes:
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}")
    dims = level_dims(int(embed_dim), int(kernel_size), int(num_levels))
    if dims[-1] < 1:
        most = max(k for k, d in enumerate(dims) if d >= 1)
        raise ValueError(
            f"embed_dim={embed_dim} with kernel_size={kernel_size} has no level {num_levels}: "
            f"floor({embed_dim} / {kernel_size}**{num_levels}) is 0; num_levels may be at most {most}"
        )
    return dims


def tensors_of(parameters: nn.ParameterList) -> list[Tensor]:
    """As `list(parameters)`, which takes much of the time that a small batch takes the host."""
    by_name = parameters._parameters
    try:
        return [by_name[str(k)] for k in range(len(parameters))]
    except KeyError:  # parametrized or pruned
        for make in parameters._forward_pre_hooks.values():  # what pruning leaves to a call, which a list never gets
            make(parameters, ())
        return list(parameters)


# Methods of a part that somebody may replace on the object.
REPLACEABLE = ("forward", "levels", "tensors", "block_units", "scales", "degrees")


def replaced(module: nn.Module, names: Sequence[str]) -> list[str]:
    """Which methods somebody has replaced on the object."""
    return [name for name in names if name in vars(module)]


def is_plain(part: nn.Module) -> bool:
    """Whether a part is one of these whose calls nobody observes or replaces: then they may be worked around."""
    if type(part) not in (HeuristicAggregator, AdaptiveAggregator, Contribution):
        return False
    hooks = (part._forward_pre_hooks, part._forward_hooks, part._backward_pre_hooks, part._backward_hooks)
    if any(hooks) or nn.modules.module._has_any_global_hook():
        return False
    return not replaced(part, REPLACEABLE)


class Keeper(nn.Module):
    """Keeps, for inference, what it makes of its weights as long as they do not change."""

    def __init__(self) -> None:
        super().__init__()
        self._kept = ops.WeightsCache()

    def cache(self) -> ops.WeightsCache | None:
        """None under a compiler or a transform, in training, and where a gradient is wanted.

        The last drops what was kept: the next step may change weights unseen.
        """
        if self.training or not is_eager():
            return None
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in self.parameters()):
            self.forget()  # a step by hand on `weight.data` would not show
            return None
        return self._kept

    def forget(self) -> None:
        self._kept.clear()

    def train(self, mode: bool = True) -> Self:
        self.forget()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.forget()  # to another dtype and back, a weight is another, of the same version
        return super()._apply(*args, **kwargs)


class Aggregator(Keeper):
    """Units of one modality's embeddings."""

    def __init__(self, embed_dim: int, side: str, *, normalize: bool) -> None:
        super().__init__()
        self.embed_dim, self.chain, self.normalize = embed_dim, CHAIN[side], normalize

    def levels(self) -> tuple[Tensor | list[Tensor], ops.WeightsCache | None]:
        """Weights of levels 1 to L as :func:`esl_fast.ops.aggregate` takes them, and the cache for it."""
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """All parameters, faster than :meth:`parameters`."""
        raise NotImplementedError

    def forward(self, x: Tensor, levels: int | None = None) -> Tensor:
        """Units of ``x (..., d)``, of levels 0 to ``levels`` (default: all)."""
        ops.checks.floating("features", x)
        if x.shape[-1:] != (self.embed_dim,):
            raise ValueError(f"features have shape {tuple(x.shape)}; expected (..., {self.embed_dim})")
        weights, cache = self.levels()
        weights = weights if levels is None else weights[:levels]
        return ops.aggregate(x, weights, chain=self.chain, normalize=self.normalize, cache=cache)

    def block_units(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """What makes units of block after block; see :func:`esl_fast.ops.block_units`."""
        cache = self.cache()

        def make(_: Sequence[Tensor] = ()) -> Callable[[Tensor], Tensor]:
            weights, _ = self.levels()
            return ops.block_units(weights, dtype, chain=self.chain, normalize=self.normalize, cache=cache)

        # Found by the parameters themselves, which saves asking for the taps that are made of them.
        return make() if cache is None else cache.get(f"block_units {dtype}", self.tensors(), make)


class HeuristicAggregator(Aggregator):
    """Each level filters its predecessor with one learned s-tap window of stride s."""

    def __init__(self, dims: Sequence[int], kernel_size: int, side: str, *, normalize: bool) -> None:
        super().__init__(dims[0], side, normalize=normalize)
        self.weight = nn.Parameter(torch.empty(len(dims) - 1, CHANNELS, kernel_size))
        nn.init.uniform_(self.weight, -1 / math.sqrt(kernel_size), 1 / math.sqrt(kernel_size))  # as nn.Conv1d does

    def tensors(self) -> list[Tensor]:
        return [self.weight]

    def levels(self) -> tuple[Tensor, None]:
        cache = self.cache()
        if cache is None or torch.is_grad_enabled():
            return self._taps([self.weight]), None
        return cache.get("taps", (self.weight,), self._taps), None

    @staticmethod
    def _taps(weights: Sequence[Tensor]) -> Tensor:
        """A filter is the sum over its channels; half a precision would lose what is left where they cancel."""
        (weight,) = weights
        return weight.sum(1, dtype=torch.promote_types(weight.dtype, torch.float32))


class AdaptiveAggregator(Aggregator):
    """Each level's units are combinations of the two predecessors that its learned matrix weighs most."""

    def __init__(self, dims: Sequence[int], kernel_size: int, side: str, *, normalize: bool) -> None:
        super().__init__(dims[0], side, normalize=normalize)
        self.weights = nn.ParameterList(torch.randn(after, before) for before, after in pairwise(dims))

    def tensors(self) -> list[Tensor]:
        return tensors_of(self.weights)

    def levels(self) -> tuple[list[Tensor], ops.WeightsCache | None]:
        return tensors_of(self.weights), self.cache()


def make_aggregator(name: str, dims: Sequence[int], kernel_size: int, side: str, *, normalize: bool) -> nn.Module:
    cls = {"heuristic": HeuristicAggregator, "adaptive": AdaptiveAggregator}[name]
    return cls(dims, kernel_size, side, normalize=normalize)


class Contribution(Keeper):
    """Degrees of the global variant: ``w`` and two temperatures, one linear map D_k a level."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((len(dims),), 0.1))
        self.temp_scale_1 = nn.Parameter(torch.tensor(-1.0))
        self.temp_scale_2 = nn.Parameter(torch.tensor(4.0))
        # In every official checkpoint, read by nothing; kept so that a checkpoint survives the way there and back.
        self.register_buffer("temp_scale", torch.tensor(math.log(1 / 0.07)))
        self.matrices = nn.ParameterList(torch.eye(d) for d in dims)

    def degrees(self) -> Tensor:
        """``(L+1,)`` contribution degree of each level."""
        return ops.degrees(self.w, self.temp_scale_1, self.temp_scale_2)

    def scales(self) -> Tensor:
        """``(L+1,)`` degree of each level over the number of levels: what multiplies D_k in the similarity."""
        weights = self.w, self.temp_scale_1, self.temp_scale_2
        cache = self.cache()
        if cache is None or torch.is_grad_enabled():
            return ops.degrees(*weights, mean=True)
        return cache.get("scales", weights, lambda given: ops.degrees(*given, mean=True))

    def forward(self, units: Tensor, side: str, levels: Sequence[int] | None = None) -> Tensor:
        """Fold ``units`` of some levels (default: all), in the order of ``levels``."""
        matrices, scales = tensors_of(self.matrices), self.scales()
        if levels is not None:
            matrices = [matrices[k] for k in levels]
            scales = torch.stack([scales[k] for k in levels])  # a list as an index is copied, which waits for a GPU
        return ops.fold(units, matrices, scales, side=side, cache=self.cache())

    @torch.no_grad()
    def bounds(self) -> Tensor:
        """``(L+1,)`` float64, the largest magnitude that each level can add to any similarity.

        ``|scale_k| * ||D_k||_2``, since units have norm at most 1; a little more for the rounding of that norm.
        """

        def norms_of(matrices: Sequence[Tensor]) -> Tensor:
            return torch.stack([torch.linalg.matrix_norm(m.double(), 2) for m in matrices])

        matrices, cache = tensors_of(self.matrices), self.cache()
        norms = norms_of(matrices) if cache is None else cache.get("norms", matrices, norms_of)
        return self.scales().double().abs() * norms * (1 + 1e-5)


class NormedContribution(nn.Module):
    """Degrees of the region-word variant: D_k is a table normalised over both axes, with an affine of its shape."""

    def __init__(self, dims: Sequence[int], *, sharp: bool) -> None:
        super().__init__()
        self.sharp = sharp
        self.w = nn.Parameter(torch.full((len(dims),), 0.1))
        self.temp_scale_1 = nn.Parameter(torch.tensor(0.0))
        self.temp_scale_2 = nn.Parameter(torch.tensor(3.0))
        # The logarithm of both attentions' inverse temperature.
        self.temp_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.tables = nn.ParameterList(torch.randn(d, d) for d in dims)
        self.weights = nn.ParameterList(torch.ones(d, d) for d in dims)
        self.biases = nn.ParameterList(torch.zeros(d, d) for d in dims)

    def degrees(self) -> Tensor:
        """``(L+1,)`` contribution degree of each level."""
        return ops.degrees(self.w, self.temp_scale_1, self.temp_scale_2, sigmoid_gate=False, sharp=self.sharp)

    def matrices(self) -> list[Tensor]:
        """D_k of each level."""
        parts = map(tensors_of, (self.tables, self.weights, self.biases))
        compute = torch.promote_types(self.w.dtype, torch.float32)
        return [normed_matrix(*(x.to(compute) for x in level)) for level in zip(*parts, strict=True)]

    def forward(self, units: Tensor, side: str) -> Tensor:
        """Fold ``units``; ``side="image"`` is what stands on the left of D."""
        return ops.fold(units, self.matrices(), self.degrees(), side=side)


class LevelHead(nn.Module):
    """What the global and the region-word head share: sizes, parts, official weights. Arguments as theirs."""

    layout: ClassVar[official.Layout]
    normalize: ClassVar[bool]  # whether embeddings are divided by their norm first
    _shapes: list[torch.Size]  # of all parameters

    def __init__(
        self, embed_dim: int, kernel_size: int = 2, num_levels: int = 8, aggregator: str = "heuristic"
    ) -> None:
        super().__init__()
        self.dims = check_levels(embed_dim, kernel_size, num_levels, aggregator)
        self.embed_dim, self.kernel_size, self.num_levels = int(embed_dim), int(kernel_size), int(num_levels)
        self.aggregator = aggregator
        self.image = make_aggregator(aggregator, self.dims, kernel_size, "image", normalize=self.normalize)
        self.text = make_aggregator(aggregator, self.dims, kernel_size, "text", normalize=self.normalize)
        self.contribution = self.make_contribution()
        self._shapes = [parameter.shape for parameter in self.parameters()]

    def make_contribution(self) -> nn.Module:
        raise NotImplementedError

    def degrees(self) -> Tensor:
        """Contribution degree of each level ``(L+1,)``."""
        return self.contribution.degrees()

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any]) -> Self:
        """Head from the official code's weights: a state dict that holds them, or a whole checkpoint.

        Global names come with or without ``pool_frames.``; other keys are ignored. Aggregator, embedding size and
        levels follow from the shapes. Raises ValueError naming what is missing or misshapen, TypeError for what is no
        state dict.
        """
        config, weights = official.read_head(official.similarity_part(state_dict), cls.layout)
        head = cls(**config).to(next(iter(weights.values())).dtype)
        head.load_state_dict(weights)
        return head

    def to_official(self) -> dict[str, Tensor]:
        """The head's weights under the official names; :meth:`from_official` restores them exactly."""
        try:
            return official.write_head(self.state_dict(), self.aggregator, self.layout)
        except KeyError as error:
            raise ValueError(f"{error} is no plain parameter: make its pruning or parametrization permanent") from error

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, kernel_size={self.kernel_size}, num_levels={self.num_levels}, "
            f"aggregator={self.aggregator!r}"
        )
