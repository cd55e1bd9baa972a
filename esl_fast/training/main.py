"""What ``train/run.py`` does."""

import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import datetime

import esl_fast
from esl_fast.evaluation import table
from esl_fast.files import existing
from esl_fast.model.towers import pick_device
from esl_fast.scripts import build_data, program, reporting_errors
from esl_fast.training.build import build_model, seed_everything
from esl_fast.training.config import TrainConfig, parse
from esl_fast.training.interrupt import Interrupted
from esl_fast.training.runs import LAST, RESULTS, create_run, discard_run, draw_curves, find_run, hold
from esl_fast.training.trainer import Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Train from command-line arguments; returns the exit status."""
    return reporting_errors(lambda: train(parse(sys.argv[1:] if argv is None else argv)))


def train(config: TrainConfig) -> int:
    """Train, evaluate on the test split, draw the curves; prints where everything lies."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise ValueError(f"{processes} processes were started; a run is trained by one, without torchrun")
    device = pick_device(config.device)
    if device.type == "cpu" and config.precision == "fp16":
        warnings.warn("a CPU takes very long in fp16; bf16 or fp32 is faster", stacklevel=2)
    seed_everything(config.seed, config.deterministic)
    resuming = config.resume is not None
    if resuming:
        run = find_run(config.resume, config.logs)
        hold(run)
    else:
        name = config.name or f"{config.dataset}-{config.similarity}-{config.seed}-{datetime.now():%Y%m%d-%H%M%S}"
        run = create_run(config.logs, name)
    started = time.perf_counter()
    try:
        data = build_data(config)
        model = build_model(config, data, existing(run / LAST) if resuming else None).to(device)
        trainer = Trainer(config, data, model, run, resume=resuming)
    except BaseException:
        discard_run(run)
        raise
    config.save(run)
    steps = f"{trainer.total_steps} steps"
    if trainer.step >= trainer.total_steps:
        steps = f"nothing left to train at step {trainer.step} of {trainer.total_steps}"
    elif resuming:
        steps = f"from step {trainer.step} of {steps}"
    tested = 0 if data.test is None else len(data.test)
    print(
        f"{data.name}: {len(data.train)} / {len(data.val)} / {tested} images to train / validate / test"
        f"{f', {data.skipped} records skipped' if data.skipped else ''}; {config.similarity} on {device}, "
        f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} trained parameters; {steps}; run {run}"
    )
    try:
        result = trainer.fit()
    except Interrupted as interrupt:
        print(
            f"\nstopped by {interrupt} at step {trainer.step} of {trainer.total_steps}; "
            f"{'saved' if interrupt.saved else 'this step is not saved'}. "
            f"Continue with: {program('python train/run.py')} --resume {run}",
            file=sys.stderr,
        )
        return 128 + interrupt.signal
    finally:
        trainer.log.close()
    picture = draw_curves(run, result["chance_rsum"])
    told = {name: getattr(config, name) for name in ("dataset", "similarity", "seed")}
    told["version"] = esl_fast.__version__
    (run / RESULTS).write_text(json.dumps(result | told, indent=2) + "\n")
    print(
        f"\n{result['split']}, {result['images']} images x {result['captions']} captions "
        f"(best checkpoint by validation rsum: {result['best_val_rsum']:.1f} at step {result['best_step']}"
        f"{'' if result['best_step'] else ', before training'})"
    )
    print(table({config.similarity: result["metrics"]}))
    seconds = time.perf_counter() - started
    print(f"chance rsum {result['chance_rsum']:.1f}; {seconds:.0f} s; curves {picture}; checkpoint {run / 'best'}")
    return 0
