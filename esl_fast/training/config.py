"""Everything a training run can be told, from the command line, a YAML file or a recipe."""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from esl_fast.data import LOADERS
from esl_fast.data.regions import CAPTIONS_PER_IMAGE
from esl_fast.files import replace_text
from esl_fast.model.checkpoint import load_checkpoint
from esl_fast.model.heads import REGION_WORD_SIMILARITIES, SIMILARITIES
from esl_fast.scripts import (
    OPTIONS_FILE,
    check_given,
    check_least,
    config_first,
    program,
    read_options,
    with_underscores,
)
from esl_fast.training.runs import find_run

RECIPES = Path(__file__).with_name("recipes")
# Data sets without a recipe of their own follow the official one.
RECIPE_OF = {"synthetic": "synthetic", "features": "features"}
# Images in a region set from which on the official recipe is its default.
LARGE = 10_000
PATHS = ("data_root", "image_root", "annotations", "features", "bert", "checkpoint")  # of a file or a folder
NAMES = ("model", "pretrained")  # or the path of a file
# Options that a checkpoint sets.
OF_MODEL = ("similarity", "kernel_size", "num_levels", "text_tower", "embed_dim")


@dataclass
class TrainConfig:
    """Train an image-text matching model.

    Args:
        dataset: synthetic (drawn on the spot, needs no files), flickr30k, coco, karpathy (any Karpathy file with an
            image folder), features (a Karpathy file with precomputed image features) or regions (precomputed region
            features).
        recipe: Defaults of all other options, which --help shows for the data set given: auto (by data set), official,
            features, synthetic, region-word (the paper's, with BERT) or regions (fast, for small data).
        data_root: Folder of the data set.
        image_root: Folder of the images, where it is not the usual one under data_root.
        annotations: Annotation file, where it is not the usual one under data_root.
        features: .npy file of precomputed image features, where data_root holds more than one.
        on_error: What an unreadable image or record does: raise names it and stops, skip leaves it out and counts.
        checkpoint: Start from this model, a folder saved by training or an official .pth file, in place of a new one:
            its options of the model hold. Another similarity, kernel_size or num_levels puts a new head on its towers
            (not so between global and region-word similarities of pictures, whose towers differ).
        similarity: esl-heuristic, esl-adaptive, cosine (the baseline), region-word-heuristic or region-word-adaptive.
        kernel_size: ESL: a level has 1/kernel_size of its predecessor's units.
        num_levels: ESL: levels beyond the embedding itself.
        model: open_clip architecture, a .json configuration file, or esl-tiny (small, trains on a CPU). With a
            checkpoint, null or the same.
        pretrained: open_clip tag or a local weights file; none starts from random weights.
        text_tower: open_clip (the model's text transformer), bert, or for small data bag (mean of token embeddings) or
            words (a vector for each token).
        bert: Local folder of a BERT (config.json, vocab.txt and, unless it is to start from random weights, weights).
        embed_dim: Width of the features where no open_clip tower sets it; 512 if not given.
        freeze_image: Do not train the image tower.
        freeze_text: Do not train the text tower.
        freeze_image_layers: Do not train what comes before and in the first n layers of the image tower.
        freeze_text_layers: Do not train what comes before and in the first n layers of the text tower.
        epochs: Passes over all training captions.
        batch_size: Pairs a step.
        accum_freq: Encode each batch in so many parts to save memory; the loss still sees the whole batch, batch norm
            part by part.
        lr: Peak learning rate of the towers.
        head_lr: Peak learning rate of the similarity head.
        bert_lr: Peak learning rate of a BERT.
        wd: Decoupled weight decay, on all parameters.
        beta1: AdamW.
        beta2: AdamW.
        eps: AdamW.
        warmup: Share of all steps over which the learning rate rises linearly.
        schedule: What it does then: cosine falls to 0 on half a cosine, step falls to a tenth once.
        decay_epoch: Epochs before the fall of the step schedule.
        grad_clip: Largest gradient norm; 0 does not clip.
        loss: infonce, hinge (ranking with a margin), or auto: hinge for region-word similarities, infonce for others.
        margin: Hinge: how far a negative must stay behind.
        hinge_epochs: Hinge: first epochs, in which all negatives count; then only the hardest.
        size_augmentation: Probability with which each region is dropped and each word masked, replaced or deleted.
        same_image: Other captions of a pair's own image in the batch count as negative, positive (hinge: as ignore),
            or ignore leaves them out.
        precision: fp32, bf16 or fp16 (mixed precision in the towers).
        evals_per_epoch: Evaluations on the validation split in an epoch.
        patience: Stop after so many evaluations without a better rsum; 0 never stops early.
        eval_batch_size: Images or captions encoded at a time in evaluation.
        workers: Processes that load data, at most one a CPU; 0 loads in the main process.
        device: auto, cpu, cuda or cuda:N.
        seed: Of initialisation, order and augmentation.
        deterministic: Use deterministic algorithms only (slower on a GPU; on a CPU runs repeat bit by bit anyway).
        logs: Folder that holds the runs.
        name: Name of this run's folder; by default made of data set, similarity, seed and time.
        resume: latest or a run's folder: continue that run where it stopped, with its configuration; options given
            beside it override, in later resumes too. On the command line only.
        log_every: Steps between two lines of metrics.jsonl.
    """

    dataset: Literal[tuple(LOADERS)] = "synthetic"
    recipe: str = "auto"
    data_root: str | None = None
    image_root: str | None = None
    annotations: str | None = None
    features: str | None = None
    on_error: Literal["raise", "skip"] = "raise"
    checkpoint: str | None = None
    similarity: Literal[SIMILARITIES + REGION_WORD_SIMILARITIES] = "esl-heuristic"
    kernel_size: int = 2
    num_levels: int = 8
    model: str | None = "ViT-B-16"
    pretrained: str | None = None
    text_tower: Literal["open_clip", "bert", "bag", "words"] = "open_clip"
    bert: str | None = None
    embed_dim: int | None = None
    freeze_image: bool = False
    freeze_text: bool = False
    freeze_image_layers: int = 0
    freeze_text_layers: int = 0
    epochs: int = 15
    batch_size: int = 64
    accum_freq: int = 1
    lr: float = 1e-6
    head_lr: float = 3e-5
    bert_lr: float = 5e-5
    wd: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    warmup: float = 0.1
    schedule: Literal["cosine", "step"] = "cosine"
    decay_epoch: int = 15
    grad_clip: float = 1.0
    loss: Literal["auto", "infonce", "hinge"] = "auto"
    margin: float = 0.2
    hinge_epochs: int = 1
    size_augmentation: float = 0.0
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
        check_given(self)
        check_least(self, {
            "epochs": 1, "batch_size": 2, "accum_freq": 1, "evals_per_epoch": 1, "patience": 0, "workers": 0,
            "eval_batch_size": 1, "log_every": 1, "lr": 0, "head_lr": 0, "wd": 0, "grad_clip": 0, "warmup": 0,
            "freeze_image_layers": 0, "freeze_text_layers": 0, "embed_dim": 1,
            "bert_lr": 0, "decay_epoch": 1, "margin": 0, "hinge_epochs": 0, "size_augmentation": 0,
        })  # fmt: skip
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; expected 0 to {2**32 - 1}")
        if self.checkpoint is None and self.model is None:
            raise ValueError("model is None, which goes with a checkpoint only")
        if self.checkpoint is not None and self.pretrained is not None:
            raise ValueError(f"pretrained is {self.pretrained!r}, but the weights are those of {self.checkpoint}")
        if self.bert is not None and self.text_tower != "bert":
            raise ValueError(f"bert is {self.bert!r}, but text_tower is {self.text_tower!r}; expected 'bert'")
        if self.warmup > 1:
            raise ValueError(f"warmup is {self.warmup}; expected a share of all steps, 0 to 1")
        if not self.size_augmentation < 1:
            raise ValueError(f"size_augmentation is {self.size_augmentation}; expected a probability below 1")
        if self.accum_freq > self.batch_size:
            raise ValueError(f"accum_freq is {self.accum_freq}; a batch of {self.batch_size} has no so many parts")

    @property
    def objective(self) -> str:
        """The loss that ``auto`` means."""
        if self.loss != "auto":
            return self.loss
        return "hinge" if self.similarity in REGION_WORD_SIMILARITIES else "infonce"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, run: Path) -> None:
        """As a file for ``--config``, which starts another run like this one, from any folder."""
        options = self.to_dict() | {"resume": None, "name": None}
        for name in PATHS + NAMES:
            value = options[name]
            if value and (os.path.isfile(value) or (name in PATHS and os.path.isdir(value))):
                options[name] = os.path.abspath(value)
        replace_text(run / OPTIONS_FILE, yaml.safe_dump(options, sort_keys=False))


def _options_of(run: Path) -> Path:
    path = run / OPTIONS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"cannot resume {run}: its options are gone, {path} is not there")
    unknown = read_options(path).keys() - {field.name for field in fields(TrainConfig)}
    if unknown:
        raise ValueError(f"{path} has an option that is none: {', '.join(sorted(unknown))}")
    return path


def recipe_name(dataset: str, data_root: str | None = None, bert: str | None = None) -> str:
    """Which recipe ``auto`` is: the official one, or one that is fast on small data."""
    if dataset == "regions":
        return "region-word" if bert is not None or _images_in(data_root) >= LARGE else "regions"
    return RECIPE_OF.get(dataset, "official")


def _images_in(data_root: str | None) -> int:
    """Images to train on in a folder of regions; 0 where there is none to count, which loading complains about."""
    folder = Path(data_root or "")
    try:
        rows = len(np.load(folder / "train_ims.npy", mmap_mode="r"))
        with (folder / "train_caps.txt").open("rb") as captions:  # for each of which an image may stand there again
            return min(rows, sum(1 for _ in captions) // CAPTIONS_PER_IMAGE)
    except (OSError, ValueError, EOFError):
        return 0


def _recipe_of(asked: Any) -> tuple[str, dict[str, Any]]:
    """Name of the recipe that is asked for, and the defaults that it sets."""
    name = asked.recipe
    if name == "auto":
        name = recipe_name(asked.dataset, asked.data_root, asked.bert)
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
        raise ValueError(f"recipe is {name!r}; accepted: auto, {known}")
    return name, read_options(path)


def _options_in(checkpoint: str) -> dict[str, Any]:
    model = load_checkpoint(checkpoint).config
    return {name: getattr(model, name) for name in OF_MODEL} | {"model": None, "pretrained": None}


def parse(argv: Sequence[str]) -> TrainConfig:
    """Configuration from the command line over a YAML file over the data set's recipe (or the resumed run's own).

    Exits with a message for unknown or badly typed options, ``--help`` and ``--print_config``. Raises ValueError for
    values out of range, and FileNotFoundError without a run to resume or a checkpoint to start from.
    """
    from jsonargparse import ArgumentParser

    argv = config_first(with_underscores(argv, TrainConfig))

    def parser(**kwargs: Any) -> ArgumentParser:
        parser = ArgumentParser(prog=program("train/run.py"), description=TrainConfig.__doc__.splitlines()[0], **kwargs)
        parser.add_argument("--config", action="config", help="YAML file of options; the command line overrides it.")
        parser.add_class_arguments(TrainConfig, as_group=False)
        return parser

    # A first look, only to learn which defaults hold: those of the run to resume or of the recipe.
    looking = [arg for arg in argv if arg not in ("-h", "--help") and not arg.startswith("--print_config")]
    asked, given = parser().parse_args(looking), parser().parse_args(looking, defaults=False)
    if asked.resume and not any(arg.partition("=")[0] == "--resume" for arg in argv):
        raise ValueError(f"a --config file says resume: {asked.resume}; say it on the command line with --resume")
    for option in ("--name", "--checkpoint"):
        if asked.resume and any(arg.partition("=")[0] == option for arg in argv):
            raise ValueError(f"{option} is of a new run; --resume goes on with an old one, in its folder")
    run = find_run(asked.resume, asked.logs) if asked.resume else None
    final, defaults = parser(), {}
    if run is None:
        recipe, defaults = _recipe_of(asked)
        if asked.checkpoint is not None:
            defaults |= _options_in(asked.checkpoint)
        final.set_defaults(defaults)
    else:
        argv = [f"--config={_options_of(run)}", *argv]
    options = final.parse_args(argv).as_dict()
    options.pop("config", None)
    if run is None:
        options["recipe"] = recipe
    if options["text_tower"] == "open_clip" and "embed_dim" not in given:
        options["embed_dim"] = None  # a recipe's is for towers that do not set it
    config = TrainConfig(**options | {"resume": run and str(run)})
    for name, reason in without_effect(config):
        if name in given and getattr(config, name) not in (getattr(TrainConfig, name), defaults.get(name)):
            warnings.warn(f"{name} has no effect: {reason}", stacklevel=2)
    return config


def without_effect(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """Options that this configuration does not use, and why."""
    never = config.schedule == "step" and config.decay_epoch >= config.epochs
    no_clip = config.dataset in ("features", "regions") and config.text_tower != "open_clip"
    for names, unused, reason in (
        (("model", "pretrained"), no_clip, "no tower is open_clip's"),
        (("margin", "hinge_epochs"), config.objective != "hinge", f"the loss is {config.objective}"),
        (("kernel_size", "num_levels", "head_lr"), config.similarity == "cosine", "cosine has no weights"),
        (("bert_lr",), config.text_tower != "bert" or config.freeze_text, "no BERT is trained"),
        (("decay_epoch",), config.schedule != "step", f"the schedule is {config.schedule}"),
        (("schedule", "decay_epoch"), never, f"it falls after {config.decay_epoch} epochs, of {config.epochs}"),
        (("freeze_image_layers",), config.freeze_image, "the whole tower is frozen"),
        (("freeze_text_layers",), config.freeze_text, "the whole tower is frozen"),
        (("on_error",), config.dataset == "synthetic", "every record is drawn"),
        (("recipe",), config.resume is not None, "the run has its options"),
    ):
        if unused:
            yield from ((name, reason) for name in names)
