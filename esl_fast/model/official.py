"""Names and shapes of the official code's weights."""

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

PREFIX = "pool_frames."
LEVELS = "cross_attn.plus_encoder.encoders_1."
SIMS = "cross_attn.sims.calculator_1."
SHORT = {"image": "img", "text": "txt"}
SCALARS = ("temp_scale", "temp_scale_1", "temp_scale_2")


def level_key(side: str, aggregator: str, level: int) -> str:
    name = f"kernel_{SHORT[side]}_{level}" if aggregator == "heuristic" else f"masks_{level}"
    return f"{LEVELS}{side}_levels.{name}.weight"


def _infer_kernel_size(dims: list[int]) -> int:
    """An s with ``d_l = floor(d_{l-1} / s)`` for every level."""
    for s in range(1, dims[0] + 1):
        if all(after == before // s for before, after in pairwise(dims)):
            return s
    raise ValueError(f"levels of {dims} units follow no kernel size")


def read_head(state_dict: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Arguments of an ``ESLHead`` and its own state dict, from official weights.

    Raises ValueError naming the missing or misshapen tensor.
    """
    tensors = {key.removeprefix("module.").removeprefix(PREFIX): value for key, value in state_dict.items()}

    def take(key: str, shape: tuple[int, ...]) -> Tensor:
        if key not in tensors:
            raise ValueError(f"no tensor {key!r} (with or without {PREFIX!r}) among {len(tensors)}: not an ESL head")
        if tuple(tensors[key].shape) != shape:
            raise ValueError(f"tensor {key!r} has shape {tuple(tensors[key].shape)}; expected {shape}")
        return tensors[key]

    matrix_count = 0
    while f"{SIMS}masks_{matrix_count}.weight" in tensors:
        matrix_count += 1
    if not matrix_count:
        take(f"{SIMS}masks_0.weight", ())
    dims = [tensors[f"{SIMS}masks_{k}.weight"].shape[0] for k in range(matrix_count)]
    levels = matrix_count - 1
    if not levels:
        raise ValueError("these ESL weights have no aggregated level: the aggregator cannot be told from the shapes")
    aggregator = "adaptive" if level_key("image", "adaptive", 1) in tensors else "heuristic"

    weights = {"contribution.w": take(f"{SIMS}sim_eval.weight", (1, levels + 1)).reshape(-1)}
    for name in SCALARS:
        weights[f"contribution.{name}"] = take(f"{SIMS}{name}.weight", (1, 1)).reshape(())
    for k, d in enumerate(dims):
        weights[f"contribution.matrices.{k}"] = take(f"{SIMS}masks_{k}.weight", (d, d))
    if aggregator == "heuristic":
        first = level_key("image", aggregator, 1)
        kernel_size = tensors[first].shape[-1] if first in tensors else 2
    else:
        kernel_size = _infer_kernel_size(dims)
    for side in SHORT:
        if aggregator == "adaptive":
            for level in range(1, levels + 1):
                key = level_key(side, aggregator, level)
                weights[f"{side}.weights.{level - 1}"] = take(key, (dims[level], dims[level - 1]))
        else:
            taps = [take(level_key(side, aggregator, k), (4, 1, kernel_size)) for k in range(1, levels + 1)]
            weights[f"{side}.weight"] = torch.stack([t[:, 0] for t in taps])
    config = {"embed_dim": dims[0], "kernel_size": kernel_size, "num_levels": levels, "aggregator": aggregator}
    return config, weights


def write_head(weights: Mapping[str, Tensor], aggregator: str) -> dict[str, Tensor]:
    """The official names and shapes for an ``ESLHead``'s state dict."""
    out = {f"{PREFIX}{SIMS}sim_eval.weight": weights["contribution.w"].reshape(1, -1)}
    for name in SCALARS:
        out[f"{PREFIX}{SIMS}{name}.weight"] = weights[f"contribution.{name}"].reshape(1, 1)
    levels = weights["contribution.w"].numel() - 1
    for k in range(levels + 1):
        out[f"{PREFIX}{SIMS}masks_{k}.weight"] = weights[f"contribution.matrices.{k}"]
    for side in SHORT:
        for level in range(1, levels + 1):
            key = PREFIX + level_key(side, aggregator, level)
            if aggregator == "adaptive":
                out[key] = weights[f"{side}.weights.{level - 1}"]
            else:
                out[key] = weights[f"{side}.weight"][level - 1].unsqueeze(1)
    return {key: value.clone() for key, value in out.items()}


CLIP_PREFIX = "clip."


def read_clip_config(state_dict: Mapping[str, Tensor]) -> dict:
    """open_clip configuration of OpenAI-named CLIP weights, from their shapes (heads = width / 64, QuickGELU)."""

    def layers(prefix: str) -> int:
        return len({key[len(prefix) :].split(".")[0] for key in state_dict if key.startswith(prefix)})

    try:
        if "visual.proj" in state_dict:
            patch = state_dict["visual.conv1.weight"].shape[-1]
            grid = math.isqrt(state_dict["visual.positional_embedding"].shape[0] - 1)
            vision = {
                "layers": layers("visual.transformer.resblocks."),
                "width": state_dict["visual.conv1.weight"].shape[0],
                "patch_size": patch,
                "image_size": patch * grid,
            }
        else:
            grid = math.isqrt(state_dict["visual.attnpool.positional_embedding"].shape[0] - 1)
            vision = {
                "layers": [layers(f"visual.layer{stage}.") for stage in (1, 2, 3, 4)],
                "width": state_dict["visual.layer1.0.conv1.weight"].shape[0],
                "image_size": 32 * grid,
            }
        width = state_dict["ln_final.weight"].shape[0]
        text = {
            "context_length": state_dict["positional_embedding"].shape[0],
            "vocab_size": state_dict["token_embedding.weight"].shape[0],
            "width": width,
            "heads": width // 64,
            "layers": layers("transformer.resblocks."),
        }
        embed_dim = state_dict["text_projection"].shape[1]
    except KeyError as error:
        raise ValueError(f"no tensor {CLIP_PREFIX + error.args[0]!r}: not an official global ESL checkpoint") from error
    return {"embed_dim": embed_dim, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
