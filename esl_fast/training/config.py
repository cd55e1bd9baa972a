"""Everything a training run can be told, from the command line, a YAML file or a recipe."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from esl_fast.model.heads import SIMILARITIES
from esl_fast.scripts import with_underscores

RECIPES = Path(__file__).with_name("recipes")
# Data sets without a recipe of their own follow the official one.
RECIPE_OF = {"synthetic": "synthetic", "features": "features"}
CONFIG_FILE = "train.yaml"


@dataclass
class TrainConfig:
    """Train an image-text matching model.

    Args:
        dataset: synthetic (drawn on the spot, needs no files), flickr30k, coco, karpathy (any Karpathy file with an
            image folder) or features (a Karpathy file with precomputed image features).
        data_root: Folder of the data set.
        image_root: Folder of the images, where it is not the usual one under data_root.
        annotations: Annotation file, where it is not the usual one under data_root.
        features: .npy file of precomputed image features, where data_root holds more than one.
        on_error: What an unreadable image or record does: raise names it and stops, skip leaves it out and counts.
        similarity: esl-heuristic, esl-adaptive or cosine (the baseline).
        kernel_size: ESL: a level has 1/kernel_size of its predecessor's units.
        num_levels: ESL: levels beyond the embedding itself.
        model: open_clip architecture, a .json configuration file, or esl-tiny (small, trains on a CPU).
        pretrained: open_clip tag or a local weights file; none starts from random weights.
        text_tower: open_clip (the model's text transformer) or bag (mean of token embeddings, for small data).
        embed_dim: Width of the features where no open_clip tower sets it.
        freeze_image: Do not train the image tower.
        freeze_text: Do not train the text tower.
        freeze_image_layers: Do not train what comes before and in the first n layers of the image tower.
        freeze_text_layers: Do not train what comes before and in the first n layers of the text tower.
        epochs: Passes over all training captions.
        batch_size: Pairs a step.
        accum_freq: Encode each batch in so many parts to save memory; the loss still sees the whole batch.
        lr: Peak learning rate of the towers.
        head_lr: Peak learning rate of the similarity head.
        wd: Decoupled weight decay, on all parameters.
        beta1: AdamW.
        beta2: AdamW.
        eps: AdamW.
        warmup: Share of all steps over which the learning rate rises linearly; it then falls to 0 on half a cosine.
        grad_clip: Largest gradient norm; 0 does not clip.
        same_image: Other captions of a pair's own image in the batch count as negative, positive, or ignore leaves
            them out.
        precision: fp32, bf16 or fp16 (mixed precision in the towers).
        evals_per_epoch: Evaluations on the validation split in an epoch.
        patience: Stop after so many evaluations without a better rsum; 0 never stops early.
        eval_batch_size: Images or captions encoded at a time in evaluation.
        workers: Processes that load data; 0 loads in the main process.
        device: auto, cpu, cuda or cuda:N.
        seed: Of initialisation, order and augmentation.
        deterministic: Use deterministic algorithms only (slower on a GPU; on a CPU runs repeat bit by bit anyway).
        logs: Folder that holds the runs.
        name: Name of this run's folder; by default made of data set, similarity and time.
        resume: latest or a run's folder: continue that run where it stopped, with its configuration; options given
            beside it override.
        log_every: Steps between two lines of metrics.jsonl.
    """

    dataset: Literal["synthetic", "flickr30k", "coco", "karpathy", "features"] = "synthetic"
    data_root: str | None = None
    image_root: str | None = None
    annotations: str | None = None
    features: str | None = None
    on_error: Literal["raise", "skip"] = "raise"
    similarity: Literal[SIMILARITIES] = "esl-heuristic"
    kernel_size: int = 2
    num_levels: int = 8
    model: str = "ViT-B-16"
    pretrained: str | None = None
    text_tower: Literal["open_clip", "bag"] = "open_clip"
    embed_dim: int = 512
    freeze_image: bool = False
    freeze_text: bool = False
    freeze_image_layers: int = 0
    freeze_text_layers: int = 0
    epochs: int = 15
    batch_size: int = 64
    accum_freq: int = 1
    lr: float = 1e-6
    head_lr: float = 3e-5
    wd: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    warmup: float = 0.1
    grad_clip: float = 1.0
    same_image: Literal["negative", "positive", "ignore"] = "negative"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    evals_per_epoch: int = 4
    patience: int = 0
    eval_batch_size: int = 256
    workers: int = 0
    device: str = "auto"
    seed: int = 24
    deterministic: bool = False
    logs: str = "runs"
    name: str | None = None
    resume: str | None = None
    log_every: int = 20

    def __post_init__(self) -> None:
        if self.pretrained in ("", "none", "None"):
            self.pretrained = None
        least = {
            "epochs": 1, "batch_size": 2, "accum_freq": 1, "evals_per_epoch": 1, "patience": 0, "workers": 0,
            "eval_batch_size": 1, "log_every": 1, "lr": 0, "head_lr": 0, "wd": 0, "grad_clip": 0, "warmup": 0,
            "freeze_image_layers": 0, "freeze_text_layers": 0, "embed_dim": 1,
        }  # fmt: skip
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {bound}")
        if self.warmup > 1:
            raise ValueError(f"warmup is {self.warmup}; expected a share of all steps, 0 to 1")
        if self.accum_freq > self.batch_size:
            raise ValueError(f"accum_freq is {self.accum_freq}; a batch of {self.batch_size} has no so many parts")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, run: Path) -> None:
        (run / CONFIG_FILE).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))


def load_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text()) or {}


def recipe(dataset: str) -> dict[str, Any]:
    """Default options for a data set: the official recipe, or one that is fast on small data."""
    return load_yaml(RECIPES / f"{RECIPE_OF.get(dataset, 'official')}.yaml")


def parse(argv: Sequence[str]) -> TrainConfig:
    """Configuration from the command line over a YAML file over the data set's recipe (or the resumed run's own).

    Exits with a message for unknown or badly typed options, ``--help`` and ``--print_config``.
    """
    from jsonargparse import ArgumentParser

    from esl_fast.training.runs import find_run

    argv = with_underscores(argv)

    def parser(**kwargs: Any) -> ArgumentParser:
        parser = ArgumentParser(prog="train/run.py", description=TrainConfig.__doc__.splitlines()[0], **kwargs)
        parser.add_argument("--config", action="config", help="YAML file of options; the command line overrides it.")
        parser.add_class_arguments(TrainConfig, as_group=False)
        return parser

    # A first look, only to learn which defaults hold: those of the run to resume or of the data set.
    first = parser()
    asked = first.parse_args([arg for arg in argv if arg not in ("-h", "--help") and not arg.startswith("--print_config")])
    defaults = load_yaml(find_run(asked.resume, asked.logs) / CONFIG_FILE) if asked.resume else recipe(asked.dataset)
    final = parser()
    final.set_defaults(defaults)
    options = final.parse_args(argv).as_dict()
    options.pop("config", None)
    return TrainConfig(**options)
