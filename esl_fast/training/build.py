"""From a configuration and a data set to a model."""

import random
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from esl_fast.data import DataSet
from esl_fast.data.pairs import tokenized
from esl_fast.model import MatchingModel, ModelConfig, load_checkpoint, sequence_towers, towers
from esl_fast.training.config import OF_MODEL, TrainConfig

# Where no tower says how wide features are.
EMBED_DIM = 512
# Options that only a head depends on.
OF_HEAD = ("similarity", "kernel_size", "num_levels")


def seed_everything(seed: int, deterministic: bool = False) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)


def build_model(config: TrainConfig, data: DataSet, resume: Path | None = None) -> MatchingModel:
    """A model for the data, as the configuration says: new, that of its checkpoint, or that of a checkpoint to resume.

    Raises ValueError for options that do not go together, with the data or with the checkpoint; what
    :func:`load_checkpoint` raises.
    """
    if resume is not None:
        model = _loaded(replace(config, bert=None), data, resume, OF_MODEL)  # it knows its vocabulary
    elif config.checkpoint is not None:
        model = _loaded(config, data, config.checkpoint, [name for name in OF_MODEL if name not in OF_HEAD])
    else:
        model = _new(config, data)
    model.freeze(
        image_tower=config.freeze_image,
        text_tower=config.freeze_text,
        image_layers=config.freeze_image_layers,
        text_layers=config.freeze_text_layers,
    )
    if not any(p.requires_grad for name, p in model.named_parameters() if name != "logit_scale"):
        raise ValueError(f"there is nothing to train: both towers are frozen, and {config.similarity} has no weights")
    return model


def _new(config: TrainConfig, data: DataSet) -> MatchingModel:
    image_tower = "open_clip" if data.image_kind == "pixels" else data.image_kind
    clip, bert, bert_weights, bag_size, vocabulary = None, None, None, None, None
    embed_dim = config.embed_dim
    if "open_clip" in (image_tower, config.text_tower):
        clip = towers.open_clip_config(config.model, config.pretrained)
    elif embed_dim is None:
        embed_dim = EMBED_DIM
    if config.text_tower == "bert":
        if config.bert is None:
            raise ValueError("text_tower is 'bert': say with --bert in which folder it lies, or choose another tower")
        bert, has_weights = sequence_towers.read_bert_folder(config.bert)
        bert_weights = config.bert if has_weights else None
    if config.text_tower in ("bag", "words"):
        vocabulary = towers.KnownTokens.vocabulary_of(tokenized(data.train, towers.clip_tokenizer(clip)))
        bag_size = len(vocabulary) + 2
    model = MatchingModel(
        ModelConfig(
            similarity=config.similarity,
            kernel_size=config.kernel_size,
            num_levels=config.num_levels,
            image_tower=image_tower,
            text_tower=config.text_tower,
            clip=clip,
            bert=bert,
            feature_dim=data.feature_dim,
            bag_size=bag_size,
            embed_dim=embed_dim,
        ),
        name=config.model,
        pretrained=config.pretrained,
        bert_weights=bert_weights,
    )
    if vocabulary is not None:
        model.text_tower.know(vocabulary)
    model.check_fits(data.image_kind, data.feature_dim)
    return model


def _loaded(config: TrainConfig, data: DataSet, checkpoint: str | Path, fixed: Sequence[str]) -> MatchingModel:
    """The model of a checkpoint, whose ``fixed`` options must be those of the configuration."""
    model = load_checkpoint(checkpoint).float()
    own = model.config
    for name in fixed:
        asked, there = getattr(config, name), getattr(own, name)
        if asked not in (None, there):
            raise ValueError(f"{name} is {asked!r}; that of {checkpoint} is {there!r}")
    if None not in (config.model, own.clip) and not towers.agree(towers.open_clip_config(config.model), own.clip):
        raise ValueError(f"model is {config.model!r}; the towers of {checkpoint} have other sizes")
    if own.bert is not None and config.bert is not None:
        sequence_towers.give_vocabulary(own.bert, config.bert)
    head = {name: getattr(config, name) for name in OF_HEAD}
    if head != {name: getattr(own, name) for name in OF_HEAD}:
        model = _with_head(model, head, checkpoint)
    model.check_fits(data.image_kind, data.feature_dim)
    return model


def _with_head(model: MatchingModel, head: dict[str, str | int], checkpoint: str | Path) -> MatchingModel:
    """The same towers with a new head."""
    told = ", ".join(f"{name} {value}" for name, value in head.items())
    weights = {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}
    renewed = MatchingModel(replace(model.config, **head))
    missing, unexpected = renewed.load_state_dict(weights, strict=False)
    if unexpected or any(not key.startswith("head.") for key in missing):
        raise ValueError(f"the towers of {checkpoint}, trained for {model.config.similarity}, cannot take {told}")
    warnings.warn(f"a new head ({told}) on the towers of {checkpoint}, whose own is left out", stacklevel=4)
    return renewed
