"""From a configuration to a data set, a model and a device."""

import inspect
import random

import torch

from esl_fast.data import LOADERS, DataSet, load_dataset
from esl_fast.data.pairs import tokenize_all
from esl_fast.model import MatchingModel, ModelConfig, towers
from esl_fast.training.config import TrainConfig


def seed_everything(seed: int, deterministic: bool = False) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)


def build_data(config: TrainConfig) -> DataSet:
    """The data set that a configuration names; raises DataError for what is wrong with it."""
    if config.data_root is None and "root" in inspect.signature(LOADERS[config.dataset]).parameters:
        raise ValueError(f"dataset {config.dataset!r} lies on disk: say where with --data-root")
    return load_dataset(
        config.dataset,
        config.data_root,
        image_root=config.image_root,
        annotations=config.annotations,
        features=config.features,
        on_error=config.on_error,
    )


def build_model(config: TrainConfig, data: DataSet) -> MatchingModel:
    """A model for the data, initialised as the configuration says."""
    image_tower = "features" if data.image_kind == "features" else "open_clip"
    clip, bag_size, vocabulary = None, None, None
    if "open_clip" in (image_tower, config.text_tower):
        clip = towers.open_clip_config(config.model, config.pretrained)
    if config.text_tower == "bag":
        tokens = tokenize_all(data.train.captions, towers.make_tokenizer(clip))
        vocabulary = towers.BagOfTokens.vocabulary_of(tokens)
        bag_size = len(vocabulary) + 2
    model = MatchingModel(
        ModelConfig(
            similarity=config.similarity,
            kernel_size=config.kernel_size,
            num_levels=config.num_levels,
            image_tower=image_tower,
            text_tower=config.text_tower,
            clip=clip,
            feature_dim=data.feature_dim,
            bag_size=bag_size,
            embed_dim=config.embed_dim,
        ),
        name=config.model,
        pretrained=config.pretrained,
    )
    if vocabulary is not None:
        model.text_tower.know(vocabulary)
    model.freeze(
        image_tower=config.freeze_image,
        text_tower=config.freeze_text,
        image_layers=config.freeze_image_layers,
        text_layers=config.freeze_text_layers,
    )
    return model
