"""An image tower, a text tower and a similarity head."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esl_fast.model import towers
from esl_fast.model.heads import make_head

IMAGE_TOWERS = ("open_clip", "features")
TEXT_TOWERS = ("open_clip", "bag")
MAX_LOGIT_SCALE = 100.0


@dataclass
class ModelConfig:
    """Everything needed to build a model again without weights; saved beside them as JSON.

    Attributes:
        similarity: ``"esl-heuristic"``, ``"esl-adaptive"`` or ``"cosine"``.
        kernel_size, num_levels: of the ESL head.
        image_tower: ``"open_clip"``, or ``"features"``: a linear map of precomputed features.
        text_tower: ``"open_clip"``, or ``"bag"``: the mean of token embeddings.
        clip: open_clip configuration (see :func:`towers.open_clip_config`); needed by the open_clip towers.
        feature_dim: width of precomputed features.
        bag_size: embeddings of the bag of tokens.
        embed_dim: d; the open_clip configuration's where there is one.
    """

    similarity: str = "esl-heuristic"
    kernel_size: int = 2
    num_levels: int = 8
    image_tower: str = "open_clip"
    text_tower: str = "open_clip"
    clip: dict[str, Any] | None = None
    feature_dim: int | None = None
    bag_size: int | None = None
    embed_dim: int | None = None

    def __post_init__(self) -> None:
        for name, value, accepted in (
            ("image_tower", self.image_tower, IMAGE_TOWERS),
            ("text_tower", self.text_tower, TEXT_TOWERS),
        ):
            if value not in accepted:
                raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}")
        if "open_clip" in (self.image_tower, self.text_tower):
            if self.clip is None:
                raise ValueError("an open_clip tower needs the open_clip configuration `clip`")
            self.embed_dim = self.clip["embed_dim"]
        for name, needed in (
            ("feature_dim", self.image_tower == "features"),
            ("bag_size", self.text_tower == "bag"),
            ("embed_dim", True),
        ):
            if needed and getattr(self, name) is None:
                raise ValueError(f"{name} is missing")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class MatchingModel(nn.Module):
    """Scores images against captions: ``model(images, tokens) -> (N, M)``.

    ``pretrained`` (a tag of the architecture ``name``, or a file) initialises the open_clip towers.
    """

    def __init__(self, config: ModelConfig, *, name: str = "", pretrained: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        clip = None
        if "open_clip" in (config.image_tower, config.text_tower):
            clip = towers.build_clip(config.clip, name, pretrained)
            self.logit_scale.data.copy_(clip.logit_scale.detach().reshape(()))
        if config.image_tower == "open_clip":
            # Convolutions are half again as fast with channels last, on a CPU and on tensor cores.
            self.image_tower = clip.visual.to(memory_format=torch.channels_last)
        else:
            self.image_tower = towers.ProjectedFeatures(config.feature_dim, config.embed_dim)
        if config.text_tower == "open_clip":
            self.text_tower = clip.text
        else:
            self.text_tower = towers.BagOfTokens(config.bag_size, config.embed_dim)
        self.head = make_head(config.similarity, config.embed_dim, config.kernel_size, config.num_levels)

    def encode_image(self, images: Tensor) -> Tensor:
        """Image features ``(N, d)`` before normalisation, of pixels ``(N, 3, H, W)`` or precomputed ``(N, F)``."""
        if images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.image_tower(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Text features ``(M, d)`` before normalisation, of token ids ``(M, T)``."""
        return self.text_tower(tokens)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Similarity ``(N, M)`` of images and captions."""
        return self.head(self.encode_image(images), self.encode_text(tokens))

    @property
    def image_transform(self) -> Callable | None:
        """From a PIL image to the tower's input; None where the input is precomputed features."""
        return towers.image_transform(self.config.clip) if self.config.image_tower == "open_clip" else None

    @property
    def tokenize(self) -> Callable[[list[str]], Tensor]:
        """From captions to token ids ``(M, T)``."""
        return towers.make_tokenizer(self.config.clip)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the temperature where CLIP keeps it; called after each optimizer step."""
        self.logit_scale.clamp_(max=torch.tensor(MAX_LOGIT_SCALE).log())

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
            towers.freeze(tower, None if whole else layers)
