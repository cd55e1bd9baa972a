"""Model files: our own (safetensors with JSON beside) and the official code's (.pth), read without running them."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from esl_fast.files import existing, replacing
from esl_fast.model import official, towers
from esl_fast.model.model import MatchingModel, ModelConfig

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file and what is wrong with it."""


class _Inert:
    """Stands for the configuration objects that official checkpoints pickle: holds attributes, does nothing."""


# What building a model from weights of any shapes may raise.
BUILDING = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError, RuntimeError)
# The only foreign names an official checkpoint may mention; each becomes an `_Inert`.
KNOWN_CONFIGS = ("config.all_config.AllConfig", "argparse.Namespace")


def write_model(model: MatchingModel, folder: Path) -> None:
    """Weights and configuration into an existing folder."""
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")


def save_checkpoint(model: MatchingModel, folder: str | Path) -> None:
    """Save a model for :func:`load_checkpoint`, replacing a former checkpoint as a whole or not at all.

    Raises FileExistsError if ``folder`` is there but holds something else.
    """
    folder = Path(folder).resolve()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).is_file()):
        raise FileExistsError(f"{folder} is not a checkpoint, and saving there would replace it; choose another folder")
    with replacing(folder) as new:
        write_model(model, new)


def checkpoint_at(path: str | Path) -> Path:
    """The folder or file that :func:`load_checkpoint` reads for a path.

    Raises FileNotFoundError: nothing there; CheckpointError: a folder that is no checkpoint.
    """
    found = Path(path).resolve()
    found = existing(found.parent if found.name == WEIGHTS else found)
    if not found.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    for name in (CONFIG, WEIGHTS):
        if found.is_dir() and not (found / name).is_file():
            hint = f"; did you mean {found / 'best'}?" if (found / "best" / name).is_file() else ""
            raise CheckpointError(f"{found} is not a checkpoint: it has no {name}{hint}")
    return found


def load_checkpoint(path: str | Path) -> MatchingModel:
    """Load a model in evaluation mode on the CPU.

    Args:
        path: a folder written by training or :func:`save_checkpoint` (or the weights file in it), or an official
            checkpoint (``.pth``), global or region-word.

    Raises:
        FileNotFoundError: nothing there.
        CheckpointError: not a checkpoint, damaged, or (official) holding anything but tensors and plain data;
            nothing in the file is ever executed.
    """
    path = checkpoint_at(path)
    return (_load_own(path) if path.is_dir() else _load_official(path)).eval()


def _load_own(folder: Path) -> MatchingModel:
    try:
        config = ModelConfig(**json.loads((folder / CONFIG).read_text()))
        weights = load_file(folder / WEIGHTS)
        model = MatchingModel(config)
        model.load_state_dict(weights, assign=True)  # keeps their dtype
        model.image_tower.to(memory_format=torch.channels_last)
    except (SafetensorError, *BUILDING) as error:
        raise CheckpointError(f"cannot read checkpoint {folder}: {error}") from error
    return model


def _load_official(path: Path) -> MatchingModel:
    contents = read_pth(path)
    try:
        if isinstance(contents, dict) and isinstance(contents.get("state_dict"), dict):
            return model_from_official(contents["state_dict"])
        if isinstance(contents, dict) and official.are_region_word_parts(contents.get("model")):
            return region_word_model_from_official(*contents["model"])
    except ImportError as error:
        raise CheckpointError(
            f"cannot build the text tower of {path}: {error}. "
            "Its head alone is `RegionWordHead.from_official(esl_fast.model.checkpoint.read_pth(path))`"
        ) from error
    except BUILDING as error:
        raise CheckpointError(f"cannot read official checkpoint {path}: {error}") from error
    raise CheckpointError(
        f"{path} is not an official ESL checkpoint: it has no `state_dict` (global) "
        "and no `model` of three state dicts (region-word)"
    )


def read_pth(path: str | Path) -> Any:
    """Contents of a PyTorch file of tensors and plain data; objects of the official configurations become inert.

    Raises CheckpointError, before anything has run, if the file names any other function or class.
    """
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in KNOWN_CONFIGS]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a pickle's protocol, with a request to report it
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes the unpickler raise
        raise CheckpointError(f"refused to load {path}: {_reason(path, error)}") from error


def _is_archive(path: str | Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"  # of a truncated one too


def _reason(path: str | Path, error: Exception) -> str:
    try:
        foreign = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - set(KNOWN_CONFIGS)
    except Exception:
        foreign = set()
    if foreign:
        return f"it would run {', '.join(sorted(foreign))}; only tensors and plain data are read"
    if Path(path).is_file() and not _is_archive(path):
        return "not a readable PyTorch checkpoint, neither an archive nor an older file of tensors and plain data"
    # Without PyTorch's advice to read it with less care.
    first_line = str(error).partition("\n")[0].partition(" Re-running")[0].partition(" In PyTorch 2.6")[0]
    return f"not a readable PyTorch checkpoint ({type(error).__name__}: {first_line})"


def model_from_official(state_dict: dict[str, Tensor]) -> MatchingModel:
    """Model from official global weights: ``clip.*`` towers and ``pool_frames.*`` head."""
    state_dict = official.named_tensors(state_dict)
    clip = {
        key.removeprefix(official.CLIP_PREFIX): value
        for key, value in state_dict.items()
        if key.startswith(official.CLIP_PREFIX)
    }
    head, head_weights = official.read_head(state_dict)
    config = official.read_clip_config(clip)
    config["preprocess"] = towers.default_preprocess()
    model = MatchingModel(
        ModelConfig(
            similarity=f"esl-{head['aggregator']}",
            kernel_size=head["kernel_size"],
            num_levels=head["num_levels"],
            clip=config,
        )
    )
    for key in towers.NOT_WEIGHTS:
        clip.pop(key, None)
    if "logit_scale" not in clip:
        raise ValueError(f"no tensor '{official.CLIP_PREFIX}logit_scale'")
    model.logit_scale.data.copy_(clip.pop("logit_scale").reshape(()))
    visual = {k.removeprefix("visual."): v for k, v in clip.items() if k.startswith("visual.")}
    model.image_tower.load_state_dict(visual)
    model.text_tower.load_state_dict({k: v for k, v in clip.items() if not k.startswith("visual.")})
    model.head.load_state_dict(head_weights)
    return model


def region_word_model_from_official(
    image: dict[str, Tensor], text: dict[str, Tensor], similarity: dict[str, Tensor]
) -> MatchingModel:
    """Model from official region-word weights: projected regions, BERT and head.

    Raises ImportError if the package that holds BERT is not installed.
    """
    head, head_weights = official.read_head(similarity, official.REGION_WORD)
    image_weights = official.read_regions(image)
    bert, text_weights = official.read_bert(text)
    model = MatchingModel(
        ModelConfig(
            similarity=f"region-word-{head['aggregator']}",
            kernel_size=head["kernel_size"],
            num_levels=head["num_levels"],
            image_tower="regions",
            text_tower="bert",
            bert={"config": bert, "vocabulary": None},
            feature_dim=image_weights["linear.weight"].shape[1],
            embed_dim=head["embed_dim"],
        )
    )
    model.image_tower.load_state_dict(image_weights)
    model.text_tower.load_state_dict(text_weights)
    model.head.load_state_dict(head_weights)
    return model
