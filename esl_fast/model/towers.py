"""Towers: open_clip's, a projection of precomputed features, a bag of tokens."""

import copy
import functools
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors import SafetensorError
from torch import Tensor, nn

NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # in OpenAI's state dicts
CONFIGS = Path(__file__).with_name("configs")
CLIP_VOCABULARY, CLIP_CONTEXT = 49408, 77
# Start and end of text, the last two entries of CLIP's vocabulary; 0 pads.
CLIP_SPECIAL = CLIP_VOCABULARY - 2


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; accepted: auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device


class ProjectedFeatures(nn.Module):
    """Image tower for precomputed pooled features ``(N, F)``: one trained linear map."""

    def __init__(self, feature_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(feature_dim, embed_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features)


class KnownTokens(nn.Module):
    """An embedding for each token that training has seen (entries 2 and up); 0 pads, 1 is for the tower to use."""

    def __init__(self, embedding: nn.Embedding | nn.EmbeddingBag) -> None:
        super().__init__()
        self.embedding = embedding
        # The unit variance of PyTorch's own would dwarf what a few thousand steps can move.
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.zeros_(self.embedding.weight[0])
        self.register_buffer("entry_of", torch.zeros(CLIP_VOCABULARY, dtype=torch.int64))

    def know(self, tokens: Tensor) -> None:
        """Take the tokens of a training set ``(M, T)`` as the known ones; there must be ``size - 2`` of them."""
        known = self.vocabulary_of(tokens)
        if len(known) != self.embedding.num_embeddings - 2:
            raise ValueError(f"{len(known)} distinct tokens given; this tower has {self.embedding.num_embeddings - 2}")
        self.entry_of.zero_()
        self.entry_of[known] = torch.arange(2, len(known) + 2, device=self.entry_of.device)

    @staticmethod
    def vocabulary_of(tokens: Tensor) -> Tensor:
        """The distinct tokens that carry meaning: padding, start and end of text left out."""
        known = tokens.unique()
        return known[(known > 0) & (known < CLIP_SPECIAL)]


class BagOfTokens(KnownTokens):
    """Text tower for small data: the mean of a caption's token embeddings, order ignored.

    Unknown tokens are left out of the mean. A caption without any known token is entry 1, since a zero vector has no
    direction to compare.
    """

    def __init__(self, size: int, embed_dim: int) -> None:
        super().__init__(nn.EmbeddingBag(size, embed_dim, mode="mean", padding_idx=0))

    def forward(self, tokens: Tensor) -> Tensor:
        entries = self.entry_of[tokens]
        unknown = (entries == 0).all(-1, keepdim=True)
        return self.embedding(torch.cat([unknown.to(entries.dtype), entries], dim=-1))


def open_clip_config(model: str, pretrained: str | None = None) -> dict[str, Any]:
    """The open_clip configuration of an architecture name, a configuration file (.json), or a shipped small one.

    QuickGELU is switched on where the pretrained weights were trained with it (OpenAI's).
    Raises ValueError for an unknown name.
    """
    path = next((p for p in (Path(model), CONFIGS / f"{model}.json") if p.suffix == ".json" and p.is_file()), None)
    try:
        config = json.loads(path.read_text()) if path else open_clip.get_model_config(model)
    except ValueError as error:
        raise ValueError(f"model is {model!r}: not JSON: {error}") from error
    if config is None:
        shipped = sorted(p.stem for p in CONFIGS.glob("*.json"))
        raise ValueError(
            f"model is {model!r}: not an open_clip architecture (see open_clip.list_models()), "
            f"a .json file, or one of {', '.join(shipped)}"
        )
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - (config.keys() if isinstance(config, dict) else set())
    if missing:
        raise ValueError(f"model is {model!r}: a configuration without {', '.join(sorted(missing))}")
    if "multimodal_cfg" in config:
        raise ValueError(f"model is {model!r}: CoCa has a third tower; expected an architecture of two")
    config = copy.deepcopy(config)
    config.pop("custom_text", None)
    preprocess = default_preprocess()
    if pretrained and is_torchscript(pretrained):
        config["quick_gelu"] = True
    elif pretrained and not Path(pretrained).is_file():
        tag = open_clip.get_pretrained_cfg(model, pretrained)
        if not tag:
            known = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
            raise ValueError(
                f"pretrained is {pretrained!r}: neither a file nor a tag of {model} (known: {known}); "
                "'none' starts from random weights"
            )
        if tag.get("quick_gelu"):
            config["quick_gelu"] = True
        preprocess.update({key: tag[key] for key in preprocess if key in tag})
    config["preprocess"] = preprocess | config.get("preprocess", {})
    return config


def agree(config: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two open_clip configurations say the same of embeddings and towers where both say something."""
    if config["embed_dim"] != other["embed_dim"]:
        return False
    parts = ((config[name], other[name]) for name in ("vision_cfg", "text_cfg"))
    return all(one[key] == two[key] for one, two in parts for key in one.keys() & two.keys())


def default_preprocess() -> dict[str, Any]:
    """CLIP's own: bicubic resize of the shorter side, centre crop, CLIP's mean and standard deviation."""
    return asdict(PreprocessCfg())


def is_torchscript(path: str | Path) -> bool:
    """Whether a file is a TorchScript archive, the form in which OpenAI distributes its weights."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def build_clip(config: dict[str, Any], model: str = "", pretrained: str | None = None) -> nn.Module:
    """open_clip model with separate ``visual`` and ``text`` towers and a ``logit_scale``.

    Random unless ``pretrained`` is a tag of ``model`` or a file in open_clip's or OpenAI's format.
    """
    try:
        clip = open_clip.CustomTextCLIP(**{key: value for key, value in config.items() if key != "preprocess"})
    except ImportError:
        raise
    except Exception as error:  # of a dozen types, for sizes that do not fit and names that are not known
        raise ValueError(f"open_clip cannot build {model or config}: {type(error).__name__}: {error}") from error
    if pretrained and Path(pretrained).is_file():
        try:
            _load_file(clip, pretrained)
        except (OSError, EOFError, LookupError, RuntimeError, SafetensorError, UnpicklingError, ValueError) as error:
            # PyTorch's advice on pickles is to run them, and its list of keys is long.
            reason = "" if isinstance(error, UnpicklingError) else f": {' '.join(str(error).split()[:30])}"
            raise ValueError(
                f"pretrained is {pretrained!r}, which holds no weights of {model} in open_clip's or OpenAI's format"
                f"{reason}"
            ) from error
    elif pretrained:
        open_clip.load_checkpoint(clip, open_clip.download_pretrained(open_clip.get_pretrained_cfg(model, pretrained)))
    return clip


def _load_file(clip: nn.Module, path: str) -> None:
    if not is_torchscript(path):
        open_clip.load_checkpoint(clip, path)
        return
    state = torch.jit.load(path, map_location="cpu").float().state_dict()
    for key in NOT_WEIGHTS:
        state.pop(key, None)
    clip.load_state_dict(open_clip.model.convert_to_custom_text_state_dict(state))


def image_transform(config: dict[str, Any]) -> Callable:
    """open_clip's evaluation transform (resize, centre crop, RGB, normalise), used in training and test alike."""
    preprocess = dict(config["preprocess"])
    preprocess["size"] = config["vision_cfg"].get("image_size", 224)
    return image_transform_v2(PreprocessCfg(**preprocess), is_train=False)


def make_tokenizer(config: dict[str, Any] | None) -> Callable[[list[str]], Tensor]:
    """Tokenizer of an open_clip configuration: list of captions -> token ids ``(M, T)``."""
    text = (config or {}).get("text_cfg", {})
    if text.get("hf_tokenizer_name"):
        return open_clip.HFTokenizer(
            text["hf_tokenizer_name"],
            context_length=text.get("context_length", CLIP_CONTEXT),
            **(text.get("tokenizer_kwargs") or {}),
        )
    return clip_tokenizer(config)


def clip_tokenizer(config: dict[str, Any] | None) -> open_clip.SimpleTokenizer:
    """CLIP's own tokenizer, which :class:`KnownTokens` go by, as long as an open_clip configuration's texts."""
    return _clip_tokenizer((config or {}).get("text_cfg", {}).get("context_length", CLIP_CONTEXT))


@functools.lru_cache
def _clip_tokenizer(context: int) -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=context)


@functools.cache
def _clip_word_ends() -> np.ndarray:
    names = _clip_tokenizer(CLIP_CONTEXT).decoder
    return np.array([names[i].endswith("</w>") for i in range(CLIP_VOCABULARY)])


def clip_word_starts(ids: np.ndarray) -> np.ndarray:
    """Which of consecutive CLIP tokens begin a word: those that follow the last piece of one."""
    return np.append(True, _clip_word_ends()[ids[:-1]])


def blocks_of(tower: nn.Module) -> list[nn.Module]:
    """The layers of a tower in order: its largest list of modules, or a ResNet's four stages."""
    stages = [getattr(tower, f"layer{i}", None) for i in (1, 2, 3, 4)]
    if all(stage is not None for stage in stages):
        return stages
    lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    lists = [m for m in lists if len(m) > 1] or [m for m in lists if len(m) == 1]
    return list(max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))) if lists else []


def freeze(tower: nn.Module, layers: int | None = None) -> None:
    """Exclude a tower from training: all of it, or what comes before and in its first ``layers`` layers.

    Raises ValueError for a negative number, or if it has fewer layers.
    """
    if layers is None:
        tower.requires_grad_(False)
        return
    blocks = blocks_of(tower)
    if not 0 <= layers <= len(blocks):
        raise ValueError(f"cannot freeze {layers} layers: {type(tower).__name__} has {len(blocks)}")
    if layers == 0:
        return
    frozen = {id(p) for block in blocks[:layers] for p in block.parameters()}
    later = {id(p) for block in blocks[layers:] for p in block.parameters()}
    frozen |= {id(p) for p in _stem(tower) if id(p) not in later}
    for parameter in tower.parameters():
        if id(parameter) in frozen:
            parameter.requires_grad_(False)


# What each kind of open_clip tower applies before its first layer.
STEM = (
    "conv1", "conv2", "conv3", "bn1", "bn2", "bn3", "class_embedding", "positional_embedding", "ln_pre",
    "token_embedding", "trunk.patch_embed", "trunk.cls_token", "trunk.pos_embed", "trunk.norm_pre", "trunk.stem",
    "bert.embeddings",
)  # fmt: skip


def _stem(tower: nn.Module) -> Iterator[nn.Parameter]:
    for name, parameter in tower.named_parameters():
        if name.startswith(STEM):
            yield parameter
