"""Names and shapes of the official code's weights."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esl_fast.reference.aggregate import level_dims

SHORT = {"image": "img", "text": "txt"}
SCALARS = ("temp_scale", "temp_scale_1", "temp_scale_2")


class Layout(NamedTuple):
    """Where one variant keeps its head's weights, and under which names ours keeps D_k."""

    prefix: str  # that a file may have or lack
    levels: str
    sims: str
    matrices: dict[str, str]  # own name -> official name, both with the level's number for `{}`

    def level_key(self, side: str, aggregator: str, level: int) -> str:
        name = f"kernel_{SHORT[side]}_{level}" if aggregator == "heuristic" else f"masks_{level}"
        return f"{self.levels}{side}_levels.{name}.weight"


GLOBAL = Layout(
    "pool_frames.",
    "cross_attn.plus_encoder.encoders_1.",
    "cross_attn.sims.calculator_1.",
    {"matrices.{}": "masks_{}.weight"},
)
REGION_WORD = Layout(
    "",
    "plus_encoder.encoders_1.",
    "sims.calculator_1.",
    {"tables.{}": "masks_{}.weight", "weights.{}": "lynorm_{}.weight", "biases.{}": "lynorm_{}.bias"},
)


def _infer_kernel_size(dims: list[int]) -> int:
    """An s with ``d_l = floor(d_{l-1} / s)`` for every level."""
    for s in range(1, dims[0] + 1):
        if all(after == before // s for before, after in pairwise(dims)):
            return s
    raise ValueError(f"levels of {dims} units follow no kernel size")


def named_tensors(state_dict: Mapping, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a state dict, without the prefixes of their names."""
    return {
        key.removeprefix("module.").removeprefix(prefix): value
        for key, value in state_dict.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }


def similarity_part(contents: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The head's weights among what a checkpoint holds; what is no checkpoint is taken as the weights.

    Raises TypeError for what is no mapping.
    """
    if not isinstance(contents, Mapping):
        raise TypeError(f"official weights are a state dict; given a {type(contents).__name__}")
    if isinstance(contents.get("state_dict"), Mapping):
        return contents["state_dict"]
    parts = contents.get("model")
    return parts[-1] if are_region_word_parts(parts) else contents


def read_head(state_dict: Mapping[str, Tensor], layout: Layout = GLOBAL) -> tuple[dict, dict[str, Tensor]]:
    """Arguments of a head and its own state dict, from official weights.

    Raises ValueError naming the missing or misshapen tensor.
    """
    tensors = named_tensors(state_dict, layout.prefix)
    sims, level_key = layout.sims, layout.level_key

    def take(key: str, shape: tuple[int | None, ...]) -> Tensor:
        if key not in tensors:
            optional = f" (with or without {layout.prefix!r})" if layout.prefix else ""
            raise ValueError(f"no tensor {key!r}{optional} among {len(tensors)}: not an ESL head of this variant")
        tensor = tensors[key]
        if not tensor.is_floating_point():
            raise ValueError(f"tensor {key!r} has dtype {tensor.dtype}; expected floating point")
        if tensor.ndim != len(shape) or any(n not in (None, size) for n, size in zip(shape, tensor.shape, strict=True)):
            expected = ", ".join("n" if size is None else str(size) for size in shape)
            raise ValueError(f"tensor {key!r} has shape {tuple(tensor.shape)}; expected ({expected})")
        return tensor

    w = take(f"{sims}sim_eval.weight", (1, None)).reshape(-1)
    levels = len(w) - 1
    if f"{sims}masks_{levels + 1}.weight" in tensors:
        raise ValueError(f"tensor '{sims}sim_eval.weight' has shape {(1, levels + 1)}, but there are more levels")
    dims = [take(f"{sims}masks_{k}.weight", (None, None)).shape[0] for k in range(levels + 1)]
    # Without levels there is nothing to aggregate, whichever way.
    aggregator = "adaptive" if level_key("image", "adaptive", 1) in tensors else "heuristic"

    weights = {"contribution.w": w}
    for name in SCALARS:
        weights[f"contribution.{name}"] = take(f"{sims}{name}.weight", (1, 1)).reshape(())
    for own, name in layout.matrices.items():
        for k, d in enumerate(dims):
            weights[f"contribution.{own.format(k)}"] = take(sims + name.format(k), (d, d))
    if aggregator == "heuristic" and levels:
        kernel_size = take(level_key("image", aggregator, 1), (4, 1, None)).shape[-1]
        if not kernel_size or dims != level_dims(dims[0], kernel_size, levels):
            raise ValueError(f"levels of {dims} units do not follow from filters of {kernel_size} taps")
    else:
        kernel_size = _infer_kernel_size(dims) if levels else 2
    for side in SHORT:
        if aggregator == "adaptive":
            for level in range(1, levels + 1):
                key = level_key(side, aggregator, level)
                weights[f"{side}.weights.{level - 1}"] = take(key, (dims[level], dims[level - 1]))
        else:
            taps = [take(level_key(side, aggregator, k), (4, 1, kernel_size)) for k in range(1, levels + 1)]
            weights[f"{side}.weight"] = torch.stack([t[:, 0] for t in taps]) if taps else w.new_empty(0, 4, kernel_size)
    config = {"embed_dim": dims[0], "kernel_size": kernel_size, "num_levels": levels, "aggregator": aggregator}
    return config, weights


def write_head(weights: Mapping[str, Tensor], aggregator: str, layout: Layout = GLOBAL) -> dict[str, Tensor]:
    """The official names and shapes for a head's state dict."""
    out = {f"{layout.sims}sim_eval.weight": weights["contribution.w"].reshape(1, -1)}
    for name in SCALARS:
        out[f"{layout.sims}{name}.weight"] = weights[f"contribution.{name}"].reshape(1, 1)
    levels = weights["contribution.w"].numel() - 1
    for own, name in layout.matrices.items():
        for k in range(levels + 1):
            out[layout.sims + name.format(k)] = weights[f"contribution.{own.format(k)}"]
    for side in SHORT:
        for level in range(1, levels + 1):
            key = layout.level_key(side, aggregator, level)
            if aggregator == "adaptive":
                out[key] = weights[f"{side}.weights.{level - 1}"]
            else:
                out[key] = weights[f"{side}.weight"][level - 1].unsqueeze(1)
    return {layout.prefix + key: value.clone() for key, value in out.items()}


def are_region_word_parts(parts: Any) -> bool:
    """Whether this is image encoder, text encoder and similarity of a region-word checkpoint."""
    return isinstance(parts, list | tuple) and len(parts) == 3 and all(isinstance(part, Mapping) for part in parts)


# Own name of each part of the projection -> the names that official encoders give it.
REGIONS = {
    "linear": ("fc",),
    "inner": ("mlp.layers.0", "mlp.fcs.0"),
    "norm": ("mlp.bns.0",),
    "outer": ("mlp.layers.1", "mlp.fcs.1"),
}


def read_regions(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of ``ProjectedRegions`` from an official image encoder; what it holds beside is not used there either.

    Raises ValueError naming what is missing.
    """
    tensors = named_tensors(state_dict)
    weights = {}
    for own, names in REGIONS.items():
        found = next((name for name in names if f"{name}.weight" in tensors), None)
        if found is None:
            raise ValueError(f"no tensor '{names[0]}.weight' in the image encoder: not a projection of regions")
        parameters = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        for parameter in parameters[: 5 if own == "norm" else 2]:
            name = f"{found}.{parameter}"
            if name not in tensors:
                raise ValueError(f"no tensor {name!r} in the image encoder: not a projection of regions")
            weights[f"{own}.{parameter}"] = tensors[name]
    return weights


def read_bert(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Sizes of a BERT and weights of ``BertTokens`` from an official text encoder (heads = width / 64).

    Raises ValueError naming what is missing.
    """
    tensors = named_tensors(state_dict)
    # The pooler serves another task, position_ids are a constant.
    unused = ("bert.pooler.", "bert.embeddings.position_ids")
    weights = {
        key: value
        for key, value in tensors.items()
        if key.startswith(("bert.", "linear.")) and not key.startswith(unused)
    }
    try:
        width = tensors["linear.weight"].shape[1]
        words = tensors["bert.embeddings.word_embeddings.weight"]
        sizes = {
            "vocab_size": words.shape[0],
            "hidden_size": width,
            "num_hidden_layers": len({key.split(".")[3] for key in weights if key.startswith("bert.encoder.layer.")}),
            "num_attention_heads": max(1, width // 64),
            "intermediate_size": tensors["bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
            "max_position_embeddings": tensors["bert.embeddings.position_embeddings.weight"].shape[0],
            "type_vocab_size": tensors["bert.embeddings.token_type_embeddings.weight"].shape[0],
        }
    except KeyError as error:
        raise ValueError(f"no tensor {error.args[0]!r} in the text encoder: not BERT with a linear map") from error
    return sizes, weights


CLIP_PREFIX = "clip."


def read_clip_config(state_dict: Mapping[str, Tensor]) -> dict:
    """open_clip configuration of OpenAI-named CLIP weights, from their shapes (heads = width / 64, QuickGELU)."""

    def layers(prefix: str) -> int:
        return len({key[len(prefix) :].split(".")[0] for key in state_dict if key.startswith(prefix)})

    def size(key: str, axis: int) -> int:
        shape = state_dict[key].shape
        if not -len(shape) <= axis < len(shape) or not shape[axis]:
            raise ValueError(f"tensor {CLIP_PREFIX + key!r} has shape {tuple(shape)}: not a CLIP's")
        return shape[axis]

    try:
        if "visual.layer1.0.conv1.weight" not in state_dict:
            size("visual.proj", 1)  # that it is there
            patch = size("visual.conv1.weight", -1)
            grid = math.isqrt(size("visual.positional_embedding", 0) - 1)
            vision = {
                "layers": layers("visual.transformer.resblocks."),
                "width": size("visual.conv1.weight", 0),
                "patch_size": patch,
                "image_size": patch * grid,
            }
        else:
            grid = math.isqrt(size("visual.attnpool.positional_embedding", 0) - 1)
            vision = {
                "layers": [layers(f"visual.layer{stage}.") for stage in (1, 2, 3, 4)],
                "width": size("visual.layer1.0.conv1.weight", 0),
                "image_size": 32 * grid,
            }
        width = size("ln_final.weight", 0)
        text = {
            "context_length": size("positional_embedding", 0),
            "vocab_size": size("token_embedding.weight", 0),
            "width": width,
            "heads": width // 64,
            "layers": layers("transformer.resblocks."),
        }
        embed_dim = size("text_projection", 1)
    except KeyError as error:
        raise ValueError(f"no tensor {CLIP_PREFIX + error.args[0]!r}: not an official global ESL checkpoint") from error
    return {"embed_dim": embed_dim, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
