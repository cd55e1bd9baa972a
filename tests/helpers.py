"""What several test files need: golden files, the definition written a second time, small models."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from esl_fast import ESLHead
from esl_fast.model import MatchingModel, ModelConfig

AGGREGATORS = ("heuristic", "adaptive")
# More golden files than the few kept here may lie elsewhere.
GOLDEN_FOLDERS = [Path(__file__).with_name("golden"), *map(Path, filter(None, [os.environ.get("ESL_FAST_GOLDEN")]))]


def golden_files(pattern: str) -> list[Path]:
    """Golden files by name, each once."""
    return sorted({path.name: path for folder in GOLDEN_FOLDERS for path in folder.glob(pattern)}.values())


def load_golden(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Official parameters and everything else."""
    tensors = load_file(path)
    parameters = {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")}
    return parameters, {key: value for key, value in tensors.items() if not key.startswith("param.")}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    expected = expected.detach().double()
    return ((actual.detach().double() - expected).norm() / expected.norm()).item()


def gradient_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each gradient; one that vanishes by construction is measured against the largest."""
    norms = {name: gradient.double().norm().item() for name, gradient in expected.items()}
    largest = max(norms.values())
    return {
        name: (actual[name].double() - gradient.double()).norm().item()
        / (norms[name] if norms[name] > 1e-4 * largest else largest)
        for name, gradient in expected.items()
    }


class Definition:
    """ESL's global variant, level by level, from official parameters of any float dtype."""

    def __init__(self, parameters: dict[str, Tensor]):
        self.parameters = {key.removeprefix("pool_frames."): value for key, value in parameters.items()}
        self.matrices = self._numbered("cross_attn.sims.calculator_1.masks_", start=0)

    def _numbered(self, prefix: str, start: int = 1) -> list[Tensor]:
        found = []
        while (key := f"{prefix}{start + len(found)}.weight") in self.parameters:
            found.append(self.parameters[key])
        return found

    def units(self, x: Tensor, side: str) -> list[Tensor]:
        prefix = f"cross_attn.plus_encoder.encoders_1.{side}_levels."
        kernels = self._numbered(f"{prefix}kernel_{'img' if side == 'image' else 'txt'}_")
        z = x / x.norm(dim=-1, keepdim=True)
        levels = [z]
        for weight in kernels or self._numbered(f"{prefix}masks_"):
            if kernels:
                z = F.conv1d(z.unsqueeze(1), weight, stride=weight.shape[-1]).sum(1)
            else:
                rows = weight / (weight.norm(dim=-1, keepdim=True) + 1e-8)
                second = rows.detach().sort(dim=-1, descending=True).values[:, min(2, rows.shape[1]) - 1]
                z = z @ (rows * (rows.detach() >= second[:, None])).T
            levels.append(z / (z.norm(dim=-1, keepdim=True) + 1e-8))
            if side == "image":
                z = levels[-1]
        return levels

    def degrees(self) -> Tensor:
        w, gate, sharpness = (
            self.parameters[f"cross_attn.sims.calculator_1.{name}.weight"].reshape(-1)
            for name in ("sim_eval", "temp_scale_1", "temp_scale_2")
        )
        size = w.abs()
        threshold = (size.max() - size.min()) * gate.sigmoid() + size.min()
        return torch.exp((size - threshold) * sharpness.exp()) * w

    def similarity(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        images, texts = self.units(image_features, "image"), self.units(text_features, "text")
        levels = zip(self.degrees(), images, self.matrices, texts, strict=True)
        return sum(degree * (x @ matrix @ y.T) for degree, x, matrix, y in levels) / len(images)


def info_nce(similarity: Tensor, logit_scale: Tensor) -> Tensor:
    logits = logit_scale.exp() * similarity
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def random_head(aggregator: str, embed_dim: int = 64, kernel_size: int = 2, num_levels: int = 4) -> ESLHead:
    """A head whose every parameter matters: nothing at its initial identity or constant."""
    head = ESLHead(embed_dim, kernel_size, num_levels, aggregator).eval()
    with torch.no_grad():
        head.contribution.w.uniform_(0.05, 0.5)
        head.contribution.temp_scale_2.fill_(1.5)
        for matrix in head.contribution.matrices:
            matrix.add_(0.3 * torch.randn_like(matrix) / len(matrix) ** 0.5)
    return head


VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}


def clip_config(**changes) -> dict:
    return {"embed_dim": 32, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT} | changes


def small_model(**changes) -> MatchingModel:
    """Random towers of two layers and a head of four levels."""
    return MatchingModel(ModelConfig(**({"clip": clip_config(), "num_levels": 4} | changes))).eval()


def features_model(similarity: str = "esl-heuristic") -> MatchingModel:
    """Precomputed features and a bag of tokens: a model that is small on disk and quick to build."""
    sizes = {"feature_dim": 12, "bag_size": 8, "embed_dim": 32, "num_levels": 4}
    return small_model(clip=None, image_tower="features", text_tower="bag", similarity=similarity, **sizes)
