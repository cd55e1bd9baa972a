"""What ``train/evaluate.py`` does."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import yaml

from esl_fast.data import LOADERS
from esl_fast.evaluation.protocol import evaluate, names_file
from esl_fast.evaluation.report import table
from esl_fast.model import MatchingModel, ModelConfig, load_checkpoint
from esl_fast.model.checkpoint import checkpoint_at
from esl_fast.model.sequence_towers import give_vocabulary
from esl_fast.model.towers import open_clip_config, pick_device
from esl_fast.scripts import (
    OPTIONS_FILE,
    build_data,
    check_given,
    check_least,
    config_first,
    program,
    read_options,
    reporting_errors,
    with_underscores,
)

FILES = ("data_root", "image_root", "annotations", "features")  # of a data set
# Options that the results name beside the checkpoints.
RECORDED = ("model", "pretrained", "dataset", *FILES, "split", "precision", "rerank", "shortlist")


@dataclass
class EvaluateConfig:
    """Evaluate checkpoints on a split of a data set.

    Args:
        checkpoint: A folder saved by training, or an official .pth file; several make an ensemble.
        model: In place of a checkpoint: an open_clip architecture, scored by its cosine (zero-shot).
        pretrained: Its open_clip tag, or a local weights file.
        dataset: synthetic, flickr30k, coco, karpathy (any Karpathy file with an image folder), features or regions; by
            default that of the run of the first checkpoint, as it lay then.
        data_root: Folder of the data set.
        image_root: Folder of the images, where it is not the usual one under data_root.
        annotations: Annotation file, where it is not the usual one under data_root.
        features: .npy file of precomputed image features, where data_root holds more than one.
        on_error: What an unreadable image or record does: raise names it and stops, skip leaves it out and counts.
        split: train, val or test; the others need not be there.
        five_folds: Also average over five folds of 1,000 images (COCO 1K).
        rerank: Two-stage retrieval with a region-word checkpoint: so many candidates of each query are found by a
            global similarity, and only those are sorted by regions and words.
        shortlist: Checkpoint whose global similarity finds them; by default the cosine of the mean region and word.
        bert: Folder with the vocabulary of BERT, which official region-word checkpoints lack; else it is asked of the
            Hugging Face hub.
        batch_size: Images or captions encoded at a time.
        workers: Processes that load images, at most one a CPU; 0 loads in the main process.
        precision: fp32, bf16 or fp16 (mixed precision in the towers).
        device: auto, cpu, cuda or cuda:N.
        output: JSON file for the metrics.
        save_similarity: .npy file for the similarity matrix, images x captions, which a .names.json beside it lists.
    """

    checkpoint: list[str] | str | None = None
    model: str | None = None
    pretrained: str | None = None
    dataset: Literal[tuple(LOADERS)] | None = None
    data_root: str | None = None
    image_root: str | None = None
    annotations: str | None = None
    features: str | None = None
    on_error: Literal["raise", "skip"] = "raise"
    split: Literal["train", "val", "test"] = "test"
    five_folds: bool = False
    rerank: int | None = None
    shortlist: str | None = None
    bert: str | None = None
    batch_size: int = 256
    workers: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str = "auto"
    output: str | None = None
    save_similarity: str | None = None

    def __post_init__(self) -> None:
        check_given(self)
        if isinstance(self.checkpoint, str):
            self.checkpoint = [self.checkpoint]
        check_least(self, {"batch_size": 1, "workers": 0, "rerank": 1})
        if bool(self.checkpoint) == (self.model is not None):
            raise ValueError("what should be evaluated? Give either --checkpoint or --model with --pretrained")
        if (self.model is None) != (self.pretrained in (None, "none", "None", "")):
            raise ValueError("--model and --pretrained go together: an architecture and its weights")


def parse(argv: Sequence[str]) -> EvaluateConfig:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=program("train/evaluate.py"), description=EvaluateConfig.__doc__.splitlines()[0])
    parser.add_argument("--config", action="config", help="YAML file of options; the command line overrides it.")
    parser.add_class_arguments(EvaluateConfig, as_group=False)
    argv = collect_checkpoints(config_first(with_underscores(argv, EvaluateConfig)))
    options = parser.parse_args(argv).as_dict()
    options.pop("config", None)
    return EvaluateConfig(**options)


def collect_checkpoints(argv: Sequence[str]) -> list[str]:
    """``--checkpoint A B`` and ``--checkpoint A --checkpoint B`` as the one list that the parser takes."""
    rest, paths, taking = [], [], False
    for arg in argv:
        if arg.startswith("-"):
            taking = arg.partition("=")[0] == "--checkpoint"
            if arg.startswith("--checkpoint="):
                paths += _listed(arg.partition("=")[2])
            elif not taking:
                rest.append(arg)
        elif taking:
            paths += _listed(arg)
        else:
            rest.append(arg)
    return rest + ([f"--checkpoint={json.dumps(paths)}"] if paths else [])


def _listed(arg: str) -> list[str]:
    """``[A, B]``, as help puts it, or one path."""
    if not (arg.startswith("[") and arg.endswith("]")) or Path(arg).exists():
        return [arg]
    try:
        return list(map(str, yaml.safe_load(arg)))
    except yaml.YAMLError:
        return [arg]


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate from command-line arguments; returns the exit status."""
    return reporting_errors(lambda: run(parse(sys.argv[1:] if argv is None else argv)))


def run(config: EvaluateConfig) -> int:
    device = pick_device(config.device)
    if config.shortlist is not None and config.rerank is None:
        raise ValueError("--shortlist is given without --rerank: how many candidates should it find?")
    matrix = None if config.save_similarity is None else Path(config.save_similarity)
    files = [] if config.output is None else [("--output", Path(config.output))]
    if matrix is not None:
        files += [("--save-similarity", matrix), ("--save-similarity", names_file(matrix))]
    if len({path.resolve() for _, path in files}) < len(files):
        raise ValueError(f"--output {files[0][1]} is a file that --save-similarity {matrix} writes")
    for option, path in files:
        check_writable(option, path)
    for path in (*(config.checkpoint or ()), config.shortlist):
        if path is not None:
            checkpoint_at(path)
    if config.dataset is None:
        config = replace(config, **_data_of_run(config))
    data = build_data(config, config.split)

    def load(path: str) -> MatchingModel:
        model = load_checkpoint(path)
        if config.bert is not None and model.config.text_tower == "bert":
            give_vocabulary(model.config.bert, config.bert)
        try:
            model.check_fits(data.image_kind, data.feature_dim)
        except ValueError as error:
            raise ValueError(f"{path} does not fit --dataset {config.dataset}: {error}") from error
        return model.to(device)

    def zero_shot() -> MatchingModel:
        clip = open_clip_config(config.model, config.pretrained)
        model = MatchingModel(ModelConfig("cosine", clip=clip), name=config.model, pretrained=config.pretrained)
        model.check_fits(data.image_kind, data.feature_dim)
        return model.eval().to(device)

    result = evaluate(
        [zero_shot] if config.model is not None else [partial(load, path) for path in config.checkpoint],
        getattr(data, config.split),
        five_folds=config.five_folds,
        batch_size=config.batch_size,
        workers=config.workers,
        precision=config.precision,
        save_similarity=matrix,
        rerank=config.rerank,
        shortlist=None if config.shortlist is None else partial(load, config.shortlist),
    )
    result |= {
        "checkpoints": config.checkpoint,
        **{name: getattr(config, name) for name in RECORDED},
        "skipped": data.skipped,
    }
    print(f"{config.dataset} {config.split}, {result['images']} images x {result['captions']} captions")
    rows = {"all": result["metrics"]}
    if config.five_folds:
        rows["mean of 5 x 1K"] = result["five_folds"]
    print(table(rows))
    print(f"chance rsum {result['chance_rsum']:.1f}{f'; {data.skipped} records skipped' if data.skipped else ''}")
    if config.output is not None:
        Path(config.output).write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _data_of_run(config: EvaluateConfig) -> dict[str, str]:
    """Options of the data set that the run of the first checkpoint was trained on."""
    options = checkpoint_at(config.checkpoint[0]).parent / OPTIONS_FILE if config.checkpoint else None
    if options is None or not options.is_file():
        raise ValueError("no run says which data set: name it with --dataset")
    told = read_options(options)
    if told.get("dataset") not in LOADERS:
        raise ValueError(f"{options} says dataset: {told.get('dataset')}; accepted: {', '.join(LOADERS)}")
    # Another folder has files of its own.
    roots = {Path(root).resolve() for root in (config.data_root, told.get("data_root")) if root is not None}
    names = FILES if len(roots) < 2 else ()
    found = {name: told[name] for name in names if getattr(config, name) is None and told.get(name) is not None}
    return found | {"dataset": told["dataset"]}


def check_writable(option: str, path: Path) -> None:
    """Find out before the work, not after it, that a file cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OSError(f"{option} {path} cannot be written; expected a file in a writable folder")
