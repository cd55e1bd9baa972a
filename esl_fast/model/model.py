"""An image tower, a text tower and a similarity head."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esl_fast.model import sequence_towers, towers
from esl_fast.model.heads import REGION_WORD_SIMILARITIES, make_head
from esl_fast.model.sequences import Features, Sequences, SpecialTokens
from esl_fast.ops import checks

IMAGE_TOWERS = ("open_clip", "features", "regions")
TEXT_TOWERS = ("open_clip", "bag", "words", "bert")
# These make one vector an item, which a region-word similarity cannot use.
POOLED_TOWERS = ("features", "bag")
MAX_LOGIT_SCALE = 100.0


@dataclass
class ModelConfig:
    """Everything needed to build a model again without weights; saved beside them as JSON.

    Attributes:
        similarity: ``"esl-heuristic"``, ``"esl-adaptive"``, ``"cosine"``, ``"region-word-heuristic"`` or
            ``"region-word-adaptive"``. The last two keep the vectors of regions and words apart, the others take one
            vector an item: a tower's own, or the mean of its regions or words.
        kernel_size, num_levels: of the ESL head.
        image_tower: ``"open_clip"``, ``"features"``: a linear map of precomputed features, or ``"regions"``: a linear
            map and an MLP of precomputed regions.
        text_tower: ``"open_clip"``, ``"bag"``: the mean of token embeddings, ``"words"``: one embedding a token, or
            ``"bert"``.
        clip: open_clip configuration (see :func:`towers.open_clip_config`); needed by the open_clip towers.
        bert: ``{"config": sizes, "vocabulary": list or None}`` of a BERT.
        feature_dim: width of precomputed features or regions.
        bag_size: embeddings of the bag of tokens or of the words.
        embed_dim: d; the open_clip configuration's where there is one.
    """

    similarity: str = "esl-heuristic"
    kernel_size: int = 2
    num_levels: int = 8
    image_tower: str = "open_clip"
    text_tower: str = "open_clip"
    clip: dict[str, Any] | None = None
    bert: dict[str, Any] | None = None
    feature_dim: int | None = None
    bag_size: int | None = None
    embed_dim: int | None = None

    def __post_init__(self) -> None:
        for name, value, accepted in (
            ("image_tower", self.image_tower, IMAGE_TOWERS),
            ("text_tower", self.text_tower, TEXT_TOWERS),
        ):
            checks.one_of(name, value, accepted)
            if self.similarity in REGION_WORD_SIMILARITIES and value in POOLED_TOWERS:
                usable = ", ".join(repr(other) for other in accepted if other not in POOLED_TOWERS)
                raise ValueError(f"{name} is {value!r}, one vector an item; {self.similarity} takes {usable}")
        if "open_clip" in (self.image_tower, self.text_tower):
            if self.clip is None:
                raise ValueError("an open_clip tower needs the open_clip configuration `clip`")
            if self.embed_dim not in (None, self.clip["embed_dim"]):
                raise ValueError(f"embed_dim is {self.embed_dim}; the open_clip tower's is {self.clip['embed_dim']}")
            self.embed_dim = self.clip["embed_dim"]
        for name, needed in (
            ("feature_dim", self.image_tower in ("features", "regions")),
            ("bag_size", self.text_tower in ("bag", "words")),
            ("bert", self.text_tower == "bert"),
            ("embed_dim", True),
        ):
            if needed and getattr(self, name) is None:
                raise ValueError(f"{name} is missing")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class MatchingModel(nn.Module):
    """Scores images against captions: ``model(images, tokens) -> (N, M)``.

    ``pretrained`` (a tag of the architecture ``name``, or a file) initialises the open_clip towers, ``bert_weights`` (a
    local folder) the BERT.
    """

    def __init__(
        self, config: ModelConfig, *, name: str = "", pretrained: str | None = None, bert_weights: str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        by_parts = config.similarity in REGION_WORD_SIMILARITIES
        clip = None
        if "open_clip" in (config.image_tower, config.text_tower):
            clip = towers.build_clip(config.clip, name, pretrained)
            self.logit_scale.data.copy_(clip.logit_scale.detach().reshape(()))
        if config.image_tower == "open_clip":
            # Convolutions are half again as fast with channels last, on a CPU and on tensor cores.
            visual = clip.visual.to(memory_format=torch.channels_last)
            self.image_tower = sequence_towers.PatchTokens(visual) if by_parts else visual
        elif config.image_tower == "regions":
            self.image_tower = sequence_towers.ProjectedRegions(config.feature_dim, config.embed_dim)
        else:
            self.image_tower = towers.ProjectedFeatures(config.feature_dim, config.embed_dim)
        if config.text_tower == "open_clip":
            self.text_tower = sequence_towers.TextTokens(clip.text) if by_parts else clip.text
        elif config.text_tower == "words":
            self.text_tower = sequence_towers.WordEmbeddings(config.bag_size, config.embed_dim)
        elif config.text_tower == "bert":
            self.text_tower = sequence_towers.BertTokens(config.bert["config"], config.embed_dim, bert_weights)
        else:
            self.text_tower = towers.BagOfTokens(config.bag_size, config.embed_dim)
        self.head = make_head(config.similarity, config.embed_dim, config.kernel_size, config.num_levels)

    def encode_image(self, images: Tensor, lengths: Tensor | None = None) -> Features:
        """What the head takes of images: pixels ``(N, 3, H, W)`` or precomputed ``(N, F)`` or ``(N, R, F)``.

        ``(N, d)`` before normalisation or, for a region-word head, normalised vectors of regions; ``lengths (N,)`` are
        the real regions of each image.

        Raises TypeError or ValueError for anything else.
        """
        width = self.config.feature_dim
        sizes = {"open_clip": ("N", 3, "H", "W"), "features": ("N", width), "regions": ("N", "R", width)}
        checks.floating("images", images)
        checks.shape("images", images, *sizes[self.config.image_tower])
        if images.ndim == 4:
            if not len(images):  # of which open_clip cannot tell the features' shape
                nothing = images.new_zeros(0, self.config.embed_dim)
                return Sequences(nothing[:, None]) if self.head.takes_sequences else nothing
            images = images.contiguous(memory_format=torch.channels_last)
        return self._for_head(self.image_tower(images) if lengths is None else self.image_tower(images, lengths))

    def encode_text(self, tokens: Tensor) -> Features:
        """What the head takes of token ids ``(M, T)``: ``(M, d)`` before normalisation, or normalised words.

        Raises TypeError or ValueError for anything else.
        """
        if not isinstance(tokens, Tensor) or tokens.dtype not in checks.INTEGERS:
            given = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(f"tokens is {given}; expected token ids, which model.tokenize makes of a list of captions")
        checks.shape("tokens", tokens, "M", "T")
        return self._for_head(self.text_tower(self.trim(tokens)))

    def trim(self, tokens: Tensor) -> Tensor:
        """Tokens ``(M, T)`` on the CPU without the last columns that no row reaches, where the tower can do without.

        Worth calling before they move to a GPU, where nothing waits for how far they reach.
        """
        if tokens.device.type != "cpu" or not hasattr(self.text_tower, "extent") or not len(tokens):
            return tokens
        return tokens[:, : int(self.text_tower.extent(tokens).max())]

    def _for_head(self, features: Features) -> Features:
        if not isinstance(features, Sequences):
            return features
        return features.unit_norm() if self.head.takes_sequences else features.mean()

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Similarity ``(N, M)`` of images and captions."""
        return self.head.scores(self.encode_image(images), self.encode_text(tokens)).matrix()

    @property
    def image_transform(self) -> Callable | None:
        """From a PIL image to the tower's input; None where the input is precomputed features."""
        return towers.image_transform(self.config.clip) if self.config.image_tower == "open_clip" else None

    @property
    def tokenize(self) -> Callable[[list[str]], Tensor]:
        """From captions to token ids ``(M, T)``."""
        if self.config.text_tower == "bert":
            return sequence_towers.bert_tokenizer(self.config.bert)
        if self.config.text_tower != "open_clip":
            return towers.clip_tokenizer(self.config.clip)
        return towers.make_tokenizer(self.config.clip)

    def check_fits(self, image_kind: str, feature_dim: int | None) -> None:
        """ValueError unless the towers take such images (see `DataSet`) and every token that the tokenizer makes."""
        own = "pixels" if self.config.image_tower == "open_clip" else self.config.image_tower
        if own != image_kind or (own != "pixels" and feature_dim != self.config.feature_dim):
            given, taken = (
                kind if kind == "pixels" else f"{kind} of {dim} numbers"
                for kind, dim in ((image_kind, feature_dim), (own, self.config.feature_dim))
            )
            raise ValueError(f"the data set has {given}; the model takes {taken}")
        text = (self.config.clip or {}).get("text_cfg", {})
        if self.config.text_tower == "open_clip" and not text.get("hf_tokenizer_name"):
            known = text.get("vocab_size", towers.CLIP_VOCABULARY)
            if known < towers.CLIP_VOCABULARY:
                raise ValueError(f"the model knows {known} tokens, CLIP's tokenizer makes {towers.CLIP_VOCABULARY}")

    @property
    def special_tokens(self) -> SpecialTokens:
        """Token ids that are no words. Raises ValueError for a tokenizer whose ids are not known here."""
        if self.config.text_tower == "bert":
            return sequence_towers.bert_special_tokens(self.config.bert)
        if self.config.text_tower == "open_clip" and self.config.clip.get("text_cfg", {}).get("hf_tokenizer_name"):
            raise ValueError("words can be masked among CLIP's and BERT's tokens only; set size_augmentation to 0")
        # CLIP's vocabulary has no mask; its start of text stands nowhere else, and no bag knows it.
        return SpecialTokens(towers.CLIP_SPECIAL, towers.CLIP_SPECIAL + 1, towers.CLIP_SPECIAL)

    @property
    def word_starts(self) -> Callable[[np.ndarray], np.ndarray]:
        """Of consecutive token ids, which begin a word, where :attr:`special_tokens` are known."""
        if self.config.text_tower == "bert":
            return sequence_towers.bert_word_starts(self.config.bert)
        return towers.clip_word_starts

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the temperature where CLIP keeps it; called after each optimizer step."""
        self.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))

    def train(self, mode: bool = True) -> "MatchingModel":
        """Training mode, but for towers that are frozen as a whole: their statistics must not move either."""
        super().train(mode)
        for tower in (self.image_tower, self.text_tower):
            if not any(p.requires_grad for p in tower.parameters()):
                tower.eval()
        return self

    def freeze(
        self, *, image_tower: bool = False, text_tower: bool = False, image_layers: int = 0, text_layers: int = 0
    ) -> None:
        """Exclude from training a whole tower, or what lies before and in its first layers."""
        for tower, whole, layers in (
            (self.image_tower, image_tower, image_layers),
            (self.text_tower, text_tower, text_layers),
        ):
            inner = getattr(tower, "tower", tower)  # of open_clip
            towers.freeze(inner, None if whole else layers)
