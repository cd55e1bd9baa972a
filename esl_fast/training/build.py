"""From a configuration and a data set to a model."""

import random

import torch

from esl_fast.data import DataSet
from esl_fast.data.pairs import tokenized
from esl_fast.model import MatchingModel, ModelConfig, sequence_towers, towers
from esl_fast.training.config import TrainConfig


def seed_everything(seed: int, deterministic: bool = False) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)


def build_model(config: TrainConfig, data: DataSet) -> MatchingModel:
    """A model for the data, initialised as the configuration says."""
    image_tower = "open_clip" if data.image_kind == "pixels" else data.image_kind
    clip, bert, bert_weights, bag_size, vocabulary = None, None, None, None, None
    if "open_clip" in (image_tower, config.text_tower):
        clip = towers.open_clip_config(config.model, config.pretrained)
    if config.text_tower == "bert":
        if config.bert is None:
            raise ValueError("text_tower is 'bert': say with --bert in which folder it lies, or choose another tower")
        bert, has_weights = sequence_towers.read_bert(config.bert)
        bert_weights = config.bert if has_weights else None
    if config.text_tower in ("bag", "words"):
        vocabulary = towers.BagOfTokens.vocabulary_of(tokenized(data.train, towers.make_tokenizer(clip)))
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
            embed_dim=config.embed_dim,
        ),
        name=config.model,
        pretrained=config.pretrained,
        bert_weights=bert_weights,
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
