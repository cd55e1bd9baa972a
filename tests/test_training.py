"""Training runs end to end on small data: learning, resuming, stopping, failing."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image

from esl_fast import load_checkpoint
from esl_fast.data import DataError, pairs
from esl_fast.evaluation.main import main as evaluate_main
from esl_fast.model import checkpoint
from esl_fast.training import TrainConfig, Trainer, build_data, build_model, main, seed_everything, trainer
from esl_fast.training.config import parse
from esl_fast.training.optim import lr_factor
from esl_fast.training.runs import RunLog, find_run, read_metrics

RUN_SCRIPT = Path(__file__).parents[1] / "train" / "run.py"
WORDS = ["red", "blue", "green", "dog", "cat", "bird", "runs", "sits", "jumps", "house", "tree", "lake"]


@pytest.fixture(scope="session")
def features_root(tmp_path_factory) -> Path:
    """60 / 20 / 20 images whose features are a noisy linear map of the words in their captions."""
    root = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    maps, records, features = rng.normal(size=(len(WORDS), 24)), [], []
    for i in range(100):
        chosen = rng.choice(len(WORDS), 4, replace=False)
        features.append(maps[chosen].sum(0) + 0.1 * rng.normal(size=24))
        sentences = [{"raw": " ".join(WORDS[w] for w in rng.permutation(chosen))} for _ in range(5)]
        split = "train" if i < 60 else "val" if i < 80 else "test"
        records.append({"filename": f"{i}.jpg", "split": split, "sentences": sentences})
    (root / "dataset_tiny.json").write_text(json.dumps({"images": records}))
    np.save(root / "image_features.npy", np.array(features, dtype=np.float16))
    return root


@pytest.fixture(scope="session")
def pictures_root(features_root, tmp_path_factory) -> Path:
    """The same captions with small JPEGs, and the configuration of towers to match."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    data = json.loads((features_root / "dataset_tiny.json").read_text())
    for record in data["images"]:
        noise = rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / "images" / record["filename"])
    (root / "dataset_tiny.json").write_text(json.dumps(data))
    clip = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
    }
    (root / "tiny.json").write_text(json.dumps(clip))
    return root


def options(root: Path, logs: Path, *more: str) -> list[str]:
    return [
        "--dataset=features", f"--data-root={root}", f"--logs={logs}", "--name=run", "--embed-dim=32", "--num-levels=3",
        "--epochs=3", "--batch-size=32", "--log-every=1", *more,
    ]  # fmt: skip


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(run) if entry["kind"] == "train"]


@pytest.mark.parametrize("similarity", ["esl-heuristic", "esl-adaptive", "cosine"])
def test_a_run_learns_and_leaves_what_it_promises(features_root, tmp_path, capsys, similarity):
    argv = options(features_root, tmp_path, "--epochs=12", "--lr=0.01", f"--similarity={similarity}")
    assert main(argv) == 0
    run = tmp_path / "run"
    validation = [entry["rsum"] for entry in read_metrics(run) if entry["kind"] == "val"]
    assert max(validation) > 1.5 * validation[0]
    result = json.loads((run / "results.json").read_text())
    assert result["metrics"]["rsum"] > 1.5 * result["chance_rsum"]
    assert (run / "curves.png").stat().st_size > 10_000
    assert list((run / "tensorboard").iterdir())
    assert "rsum" in capsys.readouterr().out

    output = tmp_path / "metrics.json"
    again = [f"--checkpoint={run / 'best'}", "--dataset=features", f"--data-root={features_root}", f"--output={output}"]
    assert evaluate_main(again) == 0
    assert json.loads(output.read_text())["metrics"] == result["metrics"]
    told = [entry for entry in read_metrics(run) if entry["kind"] == "train"]
    assert all(entry["grad_norm"] > 0 and entry["lr"] <= 0.01 for entry in told)
    assert all(("head_lr" in entry) == (similarity != "cosine") for entry in told)


def test_evaluation_needs_no_other_split(features_root, tmp_path, capsys):
    assert main(options(features_root, tmp_path, "--epochs=1")) == 0
    rows = np.load(features_root / "image_features.npy")
    images = json.loads((features_root / "dataset_tiny.json").read_text())["images"]
    results = {}
    for root, kept in (("test", range(80, 100)), ("val", range(60, 80)), ("train", range(60))):
        (tmp_path / root).mkdir()
        np.save(tmp_path / root / "x.npy", rows[kept])
        (tmp_path / root / "dataset.json").write_text(json.dumps({"images": [images[i] for i in kept]}))
    argv = [f"--checkpoint={tmp_path / 'run' / 'best'}", "--dataset=features", f"--output={tmp_path / 'metrics.json'}"]
    for split in ("test", "val"):
        for root in (features_root, tmp_path / split):
            assert evaluate_main([*argv, f"--split={split}", f"--data-root={root}"]) == 0
            results[split, root] = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
        assert results[split, features_root] == results[split, tmp_path / split]
    capsys.readouterr()
    for given, missing in (("test", "train"), ("val", "train")):
        assert main(options(tmp_path / given, tmp_path, f"--name={given}-only")) == 2
        assert f"no usable image in its {missing} split" in capsys.readouterr().err
    assert main(options(tmp_path / "train", tmp_path, "--name=train-only", "--epochs=1")) == 0
    result = json.loads((tmp_path / "train-only" / "results.json").read_text())
    assert result["split"] == "val"
    assert result["metrics"]["rsum"] == pytest.approx(result["best_val_rsum"])
    for given, missing in (("train", "test"), ("test", "train")):
        assert evaluate_main([*argv, f"--split={missing}", f"--data-root={tmp_path / given}"]) == 2
        assert f"no usable image in its {missing} split" in capsys.readouterr().err
    assert evaluate_main(argv) == 2
    assert "say where with --data-root" in capsys.readouterr().err


@pytest.mark.parametrize("text_tower", ["bag", "open_clip"])
def test_training_captions_are_tokenized_once(pictures_root, tmp_path, monkeypatch, text_tower):
    config = TrainConfig(
        dataset="karpathy", data_root=str(pictures_root), model=str(pictures_root / "tiny.json"), text_tower=text_tower,
        num_levels=3,
    )  # fmt: skip
    calls, tokenize_all = [], pairs.tokenize_all
    monkeypatch.setattr(pairs, "tokenize_all", lambda *args: calls.append(1) or tokenize_all(*args))
    data = build_data(config)
    (tmp_path / "metrics.jsonl").touch()
    model = build_model(config, data)
    trainer = Trainer(config, data, model, tmp_path)
    assert len(calls) == 1
    assert torch.equal(trainer.pairs.tokens, model.tokenize(data.train.captions).int())


def test_pictures_train_with_an_open_clip_tower(pictures_root, tmp_path):
    argv = [
        "--dataset=karpathy", f"--data-root={pictures_root}", f"--model={pictures_root / 'tiny.json'}",
        "--pretrained=none", f"--logs={tmp_path}", "--name=run", "--num-levels=3", "--epochs=1", "--batch-size=60",
        "--accum-freq=2", "--precision=bf16", "--workers=1", "--evals-per-epoch=2", "--freeze-image-layers=1",
    ]  # fmt: skip
    assert main(argv) == 0
    model = load_checkpoint(tmp_path / "run" / "best")
    assert model(torch.randn(2, 3, 32, 32), model.tokenize(["a red dog", "a cat", "a bird"])).shape == (2, 3)


@pytest.mark.parametrize("what", ["features", "pictures"])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_by_bit(
    what, features_root, pictures_root, tmp_path, monkeypatch
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def options_for(logs):
        if what == "features":
            return options(features_root, logs)
        # 3 x 3 convolutions, whose weights and moments do not lie in memory as they are saved
        return [
            "--dataset=karpathy", f"--data-root={pictures_root}", "--recipe=synthetic", f"--logs={logs}", "--name=run",
            "--num-levels=3", "--epochs=3", "--batch-size=60", "--log-every=1",
        ]  # fmt: skip

    assert main(options_for(whole)) == 0

    steps = 0
    step = Trainer._train_step

    def interrupted(self, batch):
        nonlocal steps
        steps += 1
        if steps in (5, 13):  # in the middle of an epoch
            os.kill(os.getpid(), signal.SIGINT if steps == 5 else signal.SIGTERM)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    assert main(options_for(broken)) == 128 + signal.SIGINT
    assert main(["--resume=latest", f"--logs={broken}"]) == 128 + signal.SIGTERM
    assert main([f"--resume={broken / 'run'}"]) == 0
    assert losses(broken / "run") == losses(whole / "run")
    results = [json.loads((logs / "run" / "results.json").read_text()) for logs in (whole, broken)]
    assert results[0] == results[1]
    ours, theirs = (load_checkpoint(logs / "run" / "last").state_dict() for logs in (whole, broken))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_image_that_cannot_be_read_does_not_cost_the_epoch(features_root, tmp_path, monkeypatch, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(options(features_root, whole)) == 0
    batches, read = 0, pairs.PairDataset.__getitems__

    def damaged(self, indices):
        nonlocal batches
        batches += 1
        if batches == 5:  # in the middle of an epoch
            raise DataError("7.jpg: cannot be read")
        return read(self, indices)

    monkeypatch.setattr(pairs.PairDataset, "__getitems__", damaged)
    assert main(options(features_root, broken)) == 2
    told = f"7.jpg: cannot be read; step 4 of 27 is saved: once that is mended, --resume {broken / 'run'} continues"
    assert told in capsys.readouterr().err
    assert main([f"--resume={broken / 'run'}"]) == 0
    assert losses(broken / "run") == losses(whole / "run")


def test_a_run_stopped_in_its_last_evaluation_is_told_how_to_go_on(features_root, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("esl_fast.training.trainer.evaluate", interrupted)
        assert main(options(features_root, tmp_path)) == 128 + signal.SIGTERM
    assert f"at step 27 of 27; saved. Continue with: python train/run.py --resume {tmp_path}" in capsys.readouterr().err
    assert main(["--resume=latest", f"--logs={tmp_path}"]) == 0
    assert "nothing left to train" in capsys.readouterr().out


def test_a_signal_in_a_destructor_is_not_lost(features_root, tmp_path, monkeypatch, capsys):
    class Dying:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)  # Python handles the signal here, and drops what its handler raises

    whole = Trainer._train_epoch

    def epoch(self, number):
        Dying()
        whole(self, number)

    reported = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    monkeypatch.setattr(Trainer, "_train_epoch", epoch)
    assert main(options(features_root, tmp_path)) == 128 + signal.SIGTERM
    assert not reported
    assert "stopped by SIGTERM at step 1 of 27; saved" in capsys.readouterr().err


def test_workers_that_a_signal_ends_too_do_not_cost_the_state(features_root, tmp_path, monkeypatch, capsys):
    step = Trainer._train_step

    def interrupted(self, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        for worker in multiprocessing.active_children():
            worker.kill()  # torch takes SIGTERM from a parent, as it is here, for the usual end
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    assert main(options(features_root, tmp_path, "--workers=1")) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM at step 1 of 27; saved" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("second", "status"), [(signal.SIGTERM, 128 + signal.SIGINT), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_only_a_second_ctrl_c_cuts_saving_short(features_root, tmp_path, monkeypatch, capsys, second, status):
    save, step = Trainer._save, Trainer._train_step

    def interrupted(self, batch):
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    def again(self, name):
        if self.step:
            os.kill(os.getpid(), second)
        return save(self, name)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    monkeypatch.setattr(Trainer, "_save", again)
    assert main(options(features_root, tmp_path)) == status
    assert ("saved" in capsys.readouterr().err) == (second == signal.SIGTERM)
    assert json.loads((tmp_path / "run" / "last" / "training.json").read_text())["progress"]["step"] == (
        1 if second == signal.SIGTERM else 0
    )


def test_a_wrong_override_leaves_the_run_as_it_was(features_root, tmp_path, capsys):
    assert main(options(features_root, tmp_path)) == 0
    before = (tmp_path / "run" / "train.yaml").read_bytes()
    assert main(["--resume=latest", f"--logs={tmp_path}", "--embed-dim=16"]) == 2
    assert f"embed_dim is 16; that of {tmp_path / 'run' / 'last'} is 32" in capsys.readouterr().err
    assert (tmp_path / "run" / "train.yaml").read_bytes() == before


def test_steps_mean_the_same_in_a_resumed_run(features_root, tmp_path, capsys):
    assert main(options(features_root, tmp_path, "--name=grp/a", "--head-lr=1e-3")) == 0
    assert "parameters; 27 steps;" in capsys.readouterr().out
    resume, run = ["--resume=latest", f"--logs={tmp_path}"], tmp_path / "grp" / "a"
    before = (run / "metrics.jsonl").read_text()
    assert main([*resume, "--batch-size=64"]) == 2
    assert "an epoch had 9 steps and now has 4" in capsys.readouterr().err
    assert main(resume) == 0
    assert "nothing left to train at step 27 of 27" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_text() == before
    assert main([*resume, "--epochs=4"]) == 0
    assert "from step 27 of 36 steps" in capsys.readouterr().out
    assert [entry["step"] for entry in read_metrics(run) if entry["kind"] == "test"] == [27, 36]


def test_a_configuration_starts_another_run_also_after_a_resume(features_root, tmp_path, capsys):
    assert main(options(features_root, tmp_path, "--epochs=1")) == 0
    assert main(["--resume=latest", f"--logs={tmp_path}"]) == 0
    file = tmp_path / "run" / "train.yaml"
    assert main([f"--config={file}", "--name=new"]) == 0
    assert losses(tmp_path / "new") == losses(tmp_path / "run")
    file.write_text(file.read_text().replace("resume: null", f"resume: {tmp_path / 'run'}"))
    assert main([f"--config={file}", "--name=newer"]) == 2
    assert "say it on the command line" in capsys.readouterr().err
    assert not (tmp_path / "newer").exists()


def test_accumulation_sees_the_whole_batch(features_root, tmp_path):
    for freq in (1, 3):
        assert main(options(features_root, tmp_path / str(freq), f"--accum-freq={freq}", "--grad-clip=0")) == 0
    once, thrice = losses(tmp_path / "1" / "run"), losses(tmp_path / "3" / "run")
    np.testing.assert_allclose(once, thrice, rtol=1e-4)


def test_killed_at_any_moment_a_run_can_be_resumed(features_root, tmp_path):
    argv = options(features_root, tmp_path, "--epochs=400", "--evals-per-epoch=9")
    command = [sys.executable, str(RUN_SCRIPT), *argv]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "last").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.7)  # saving goes on all the time
    process.kill()
    process.wait()
    assert load_checkpoint(tmp_path / "run" / "last") is not None
    assert load_checkpoint(tmp_path / "run" / "best") is not None
    assert main([f"--resume={tmp_path / 'run'}", "--epochs=1"]) == 0


def test_a_full_disk_costs_a_warning_not_the_run(features_root, tmp_path, monkeypatch):
    save = checkpoint.save_file
    calls = 0

    def failing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(28, "No space left on device")
        save(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", failing)
    with pytest.warns(UserWarning, match="No space left on device.*the checkpoint before it is intact"):
        assert main(options(features_root, tmp_path)) == 0
    assert load_checkpoint(tmp_path / "run" / "last") is not None
    assert not list((tmp_path / "run").glob("*.tmp-*"))


@pytest.mark.parametrize("failing", [1, 2])
def test_a_disk_that_is_full_from_the_start_is_one_error(features_root, tmp_path, monkeypatch, capsys, failing):
    save, calls = checkpoint.save_file, []

    def full(*args):
        calls.append(args)
        if len(calls) >= failing:
            raise OSError(28, "No space left on device")
        save(*args)

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert main(options(features_root, tmp_path)) == 2
    assert "the first checkpoint of its name: [Errno 28] No space left" in capsys.readouterr().err
    assert len(calls) == failing


@pytest.mark.parametrize(("freed", "rsum"), [(True, 40), (False, 10)])
@pytest.mark.filterwarnings("ignore:could not save")
def test_the_best_is_the_best_that_was_saved(features_root, tmp_path, monkeypatch, recwarn, freed, rsum):
    """Of validation rsums 10, 50, 40, the second cannot be saved."""
    save, rsums = Trainer._save, iter([10, 50, 40])
    full = {1} if freed else {1, 2}

    def validated(self, model, precision):
        values = dict.fromkeys(("i2t_r1", "t2i_r1", "i2t_r5", "t2i_r5", "i2t_r10", "t2i_r10"), 0.0)
        return types.SimpleNamespace(metrics=lambda: values | {"rsum": float(next(rsums))})

    def no_room(*args):
        raise OSError(28, "No space left on device")

    def failing(self, name):
        with monkeypatch.context() as context:
            if name == "best" and self.step // self.steps_per_epoch in full:
                context.setattr(checkpoint, "save_file", no_room)
            return save(self, name)

    monkeypatch.setattr(trainer.Encoder, "encode", validated)
    monkeypatch.setattr(Trainer, "_save", failing)
    assert main(options(features_root, tmp_path, "--epochs=2", "--evals-per-epoch=1")) == 0
    progress = json.loads((tmp_path / "run" / "last" / "training.json").read_text())["progress"]
    assert progress["best_rsum"] == rsum
    messages = [str(warning.message) for warning in recwarn]
    assert any("validation rsum 50.0, could not be saved" in message for message in messages)


def test_a_log_that_cannot_be_written_costs_a_warning_not_the_run(tmp_path, monkeypatch, recwarn):
    def dead(*args):
        raise RuntimeError("its thread is dead")

    def half_a_line(path, mode):
        with open(path, mode) as file:
            file.write('{"kind": "tr')
        raise OSError(28, "No space left on device")

    (tmp_path / "metrics.jsonl").touch()
    log = RunLog(tmp_path)
    log.write("train", 1, loss=1.0)
    monkeypatch.setattr(log._board, "add_scalar", dead)
    with monkeypatch.context() as context:
        context.setattr(Path, "open", half_a_line)
        for step in (2, 3):
            log.write("train", step, loss=1.0)
    log.write("train", 4, loss=1.0)
    log.close()
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 4]
    assert [str(warning.message).partition(":")[0] for warning in recwarn] == [
        "could not write metrics.jsonl", "could not write TensorBoard's scalars",
    ]  # fmt: skip


def test_early_stopping_and_the_same_run_again(features_root, tmp_path, capsys):
    argv = options(features_root, tmp_path, "--epochs=40", "--patience=2", "--lr=0", "--head-lr=0")
    assert main(argv) == 0
    assert sum(entry["kind"] == "val" for entry in read_metrics(tmp_path / "run")) == 3
    assert main(argv) == 2
    assert "holds a run already" in capsys.readouterr().err


@contextmanager
def held_by_another(run):
    fcntl = pytest.importorskip("fcntl")
    descriptor = os.open(run, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)


def test_one_process_at_a_time_trains_a_run(features_root, tmp_path, capsys):
    argv = options(features_root, tmp_path, "--epochs=1")
    (tmp_path / "run").mkdir()
    with held_by_another(tmp_path / "run"):  # before it has written anything
        assert main(argv) == 2
    assert "is being trained by another process" in capsys.readouterr().err
    assert main(argv) == 0
    with held_by_another(tmp_path / "run"):
        assert main([f"--resume={tmp_path / 'run'}", "--epochs=2"]) == 2
    assert "is being trained by another process" in capsys.readouterr().err
    assert main([f"--resume={tmp_path / 'run'}", "--epochs=2"]) == 0


def test_a_run_is_trained_by_one_process(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([f"--logs={tmp_path}"]) == 2
    assert "2 processes were started; a run is trained by one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--dataset=features", "--model=ViT-H-14", "--margin=0.3"], {"model", "margin"}),
        (["--similarity=cosine", "--num-levels=3", "--head-lr=1"], {"num_levels", "head_lr"}),
        (["--decay-epoch=3", "--freeze-image=true", "--freeze-image-layers=1"], {"decay_epoch", "freeze_image_layers"}),
        (["--dataset=regions", "--similarity=region-word-heuristic", "--margin=0.9"], {"margin"}),
        (["--similarity=esl-adaptive", "--num-levels=3", "--loss=hinge", "--margin=0.3"], set()),
        (["--schedule=step", "--decay-epoch=4", "--epochs=5"], set()),
        (["--schedule=step", "--decay-epoch=5", "--epochs=5"], {"schedule", "decay_epoch"}),
    ],
)
def test_options_without_effect_are_named(argv, named):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parse(argv)
    told = {str(warning.message).partition(" has no effect")[0] for warning in caught}
    assert told == named


def test_the_command_line_overrides_a_file_wherever_it_stands(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("batch_size: 32\n")
    for config in ([f"--config={file}"], ["--config", str(file)]):
        assert parse(["--batch-size=64", *config]).batch_size == 64


def test_a_run_may_be_repeated_with_another_similarity(features_root, tmp_path, capsys):
    """From the file that it left, whose name and choices by itself are none."""
    assert main(options(features_root, tmp_path, "--epochs=1")) == 0
    file = f"--config={tmp_path / 'run' / 'train.yaml'}"
    config = parse([file, "--similarity=region-word-heuristic"])
    assert (config.name, config.objective) == (None, "hinge")
    assert main([file, "--similarity=cosine"]) == 0
    (again,) = (path for path in tmp_path.iterdir() if path.name.startswith("features-cosine-24-"))
    result = json.loads((again / "results.json").read_text())
    assert (result["similarity"], result["dataset"], result["seed"]) == ("cosine", "features", 24)
    with (tmp_path / "run" / "train.yaml").open("a") as yaml_file:
        yaml_file.write("learning_rate: 3\n")
    capsys.readouterr()
    assert main([f"--resume={tmp_path / 'run'}"]) == 2
    assert "train.yaml has an option that is none: learning_rate" in capsys.readouterr().err
    options_file = tmp_path / "run" / "train.yaml"
    written = options_file.read_text().replace("learning_rate: 3\n", "")
    options_file.write_text(written.replace("epochs: 1", "epochs: ten"))
    with pytest.raises(SystemExit):
        main([f"--resume={tmp_path / 'run'}"])
    assert re.search(r'"epochs":\s+Expected a .*int.*ten', capsys.readouterr().err)


def test_nothing_to_train_is_refused(features_root, tmp_path, capsys):
    argv = options(features_root, tmp_path, "--similarity=cosine", "--freeze-image=true", "--freeze-text=true")
    assert main(argv) == 2
    assert "nothing to train" in capsys.readouterr().err


def test_both_files_of_features_may_be_named(features_root, tmp_path):
    argv = [arg for arg in options(features_root, tmp_path, "--epochs=1") if not arg.startswith("--data-root")]
    files = [f"--annotations={features_root / 'dataset_tiny.json'}", f"--features={features_root}/image_features.npy"]
    assert main([*argv, *files]) == 0


def test_evaluation_knows_what_a_run_was_trained_on(features_root, tmp_path, capsys):
    assert main(options(features_root, tmp_path, "--epochs=1")) == 0
    best, output = tmp_path / "run" / "best", tmp_path / "metrics.json"
    assert evaluate_main([f"--checkpoint={best}", f"--output={output}"]) == 0
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert json.loads(output.read_text())["metrics"] == result["metrics"]
    shutil.move(best, tmp_path / "alone")
    capsys.readouterr()
    assert evaluate_main([f"--checkpoint={tmp_path / 'alone'}"]) == 2
    assert "name it with --dataset" in capsys.readouterr().err


def test_zero_shot_evaluation(pictures_root, tmp_path, capsys):
    tiny = pictures_root / "tiny.json"
    weights = tmp_path / "clip.safetensors"
    clip = open_clip.CustomTextCLIP(**json.loads(tiny.read_text()))
    safetensors.torch.save_model(clip, weights)
    output = f"--output={tmp_path / 'zero.json'}"
    argv = ["--dataset=karpathy", f"--data-root={pictures_root}", output, f"--model={tiny}"]
    assert evaluate_main([*argv, f"--pretrained={weights}"]) == 0
    metrics = json.loads((tmp_path / "zero.json").read_text())["metrics"]
    data = [f"--data-root={pictures_root}", f"--logs={tmp_path}", f"--model={tiny}", f"--pretrained={weights}"]
    more = ["--similarity=cosine", "--lr=0", "--wd=0", "--epochs=1", "--batch-size=100", "--workers=0", "--name=still"]
    assert main(["--dataset=karpathy", *data, *more]) == 0
    still = json.loads((tmp_path / "still" / "results.json").read_text())["metrics"]
    assert metrics["rsum"] == pytest.approx(still["rsum"], abs=2)  # but for the temperature, the same
    capsys.readouterr()
    for wrong, message in (
        (argv, "--model and --pretrained go together"),
        (argv[:-1], "what should be evaluated"),
        ([*argv, f"--pretrained={weights}", "--checkpoint=x"], "what should be evaluated"),
    ):
        assert evaluate_main(wrong) == 2
        assert message in capsys.readouterr().err


def test_a_run_is_resumed_from_anywhere(features_root, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    monkeypatch.chdir(features_root.parent)
    assert main(options(Path(features_root.name), tmp_path, "--epochs=1")) == 0
    monkeypatch.chdir(tmp_path)
    (run / "metrics.jsonl").unlink()
    assert main(["--resume=run", "--epochs=2"]) == 0
    shutil.copytree(run, tmp_path / "copies" / "run")
    before = (run / "metrics.jsonl").read_text()
    assert main(["--resume=latest", "--logs=copies", "--epochs=3"]) == 0
    assert (run / "metrics.jsonl").read_text() == before
    assert main(["--resume=run", "--epochs=3", "--name=another"]) == 2
    assert "--name is of a new run" in capsys.readouterr().err
    (run / "train.yaml").unlink()
    assert main(["--resume=run", "--epochs=3"]) == 2
    assert "train.yaml is not there" in capsys.readouterr().err


def test_a_start_that_failed_leaves_its_name(features_root, tmp_path):
    right = options(features_root, tmp_path, f"--config={tmp_path / 'run' / 'train.yaml'}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.yaml").write_text("seed: 7\n")
    wrong = [f"--data-root={tmp_path / 'nowhere'}" if arg.startswith("--data-root") else arg for arg in right]
    assert main(wrong) == 2
    assert main(right) == 0


def test_a_run_that_ended_before_its_first_checkpoint_leaves_its_name(features_root, tmp_path, monkeypatch, capsys):
    argv = options(features_root, tmp_path, "--epochs=1")
    with monkeypatch.context() as context:
        context.setattr(Trainer, "_validate_if_due", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(argv)
    assert {"metrics.jsonl", "tensorboard", "train.yaml"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert main(argv) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    assert main([*argv, "--name=mine"]) == 2
    assert "holds thesis.txt: choose another" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "keep me"
    for checkpoint_folder in ("last", "best"):
        shutil.rmtree(tmp_path / "run" / checkpoint_folder)
    for file in ("results.json", "curves.png"):
        (tmp_path / "run" / file).unlink()
    assert main(argv) == 2
    assert "holds metrics.jsonl: choose another" in capsys.readouterr().err
    (tmp_path / "kept" / "best").mkdir(parents=True)
    (tmp_path / "written").mkdir()
    for line in ('{"epoch": 1}', "[1, 2]", "loss 0.3"):
        (tmp_path / "written" / "metrics.jsonl").write_text(line)
        assert main([*argv, "--name=written"]) == 2
    capsys.readouterr()
    assert main([*argv, "--name=kept"]) == 2
    assert "holds best: choose another" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_test_that_fails_does_not_cost_the_training(pictures_root, tmp_path, capsys, workers):
    root = tmp_path / "data"
    shutil.copytree(pictures_root, root)
    picture = next(r["filename"] for r in json.loads((root / "dataset_tiny.json").read_text())["images"][80:])
    whole = (root / "images" / picture).read_bytes()
    (root / "images" / picture).write_bytes(whole[:300])
    argv = [
        "--dataset=karpathy", f"--data-root={root}", "--recipe=synthetic", f"--logs={tmp_path}", "--name=run",
        "--num-levels=3", "--epochs=1", "--batch-size=100", f"--workers={workers}",
    ]  # fmt: skip
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert f"{picture}: cannot be read as an image" in error
    assert "is saved: once that is mended, --resume" in error
    (root / "images" / picture).write_bytes(whole)
    assert main([f"--resume={tmp_path / 'run'}"]) == 0
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    (tested,) = (entry for entry in read_metrics(tmp_path / "run") if entry["kind"] == "test")
    assert tested["step"] == result["best_step"]


def test_a_resumed_run_keeps_its_model(features_root, tmp_path, capsys):
    assert main(options(features_root, tmp_path, "--epochs=1")) == 0
    assert main([f"--resume={tmp_path / 'run'}", "--similarity=cosine", "--epochs=2"]) == 2
    error = capsys.readouterr().err
    assert f"similarity is 'cosine'; that of {tmp_path / 'run' / 'last'} is 'esl-heuristic'" in error
    assert len(error.splitlines()) < 4


def test_a_run_may_start_from_a_checkpoint(features_root, tmp_path, capsys):
    assert main(options(features_root, tmp_path, "--epochs=6", "--lr=0.01", "--similarity=esl-adaptive")) == 0
    best = tmp_path / "run" / "best"
    rsum = {entry["step"]: entry["rsum"] for entry in read_metrics(tmp_path / "run") if entry["kind"] == "val"}
    best_rsum = max(rsum.values())
    data = [f"--data-root={features_root}", f"--logs={tmp_path}"]
    argv = ["--dataset=features", *data, "--name=on", "--epochs=1", "--batch-size=32"]
    assert main([*argv, f"--checkpoint={best}"]) == 0
    first, *_ = (entry for entry in read_metrics(tmp_path / "on") if entry["kind"] == "val")
    assert (first["step"], first["rsum"]) == (0, pytest.approx(best_rsum))
    shutil.move(tmp_path / "run", tmp_path / "gone")  # a run to resume needs what it started from no more
    assert main([f"--resume={tmp_path / 'on'}", "--epochs=2", "--head-lr=0"]) == 0
    assert load_checkpoint(tmp_path / "on" / "last").config == load_checkpoint(tmp_path / "gone" / "best").config
    again = yaml.safe_load((tmp_path / "on" / "train.yaml").read_text()) | {"checkpoint": str(tmp_path / "gone/best")}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(again))
    assert main([f"--config={tmp_path / 'again.yaml'}", "--name=again", "--epochs=1"]) == 0
    capsys.readouterr()
    for argv, message in (
        (["--pretrained=openai"], "pretrained is 'openai', but the weights are those of"),
        (["--embed-dim=64"], f"embed_dim is 64; that of {tmp_path / 'gone' / 'best'} is 32"),
        (["--text-tower=words"], "text_tower is 'words'; that of"),
        (["--similarity=region-word-heuristic"], "'features', one vector an item"),
        (["--dataset=synthetic"], "the data set has pixels; the model takes features of 24 numbers"),
    ):
        root = data if "synthetic" not in argv[0] else data[1:]
        assert main(["--dataset=features", *root, "--name=x", f"--checkpoint={tmp_path / 'gone/best'}", *argv]) == 2
        assert message in capsys.readouterr().err
    assert main([f"--resume={tmp_path / 'on'}", "--checkpoint=x"]) == 2
    assert "--checkpoint is of a new run" in capsys.readouterr().err


def test_a_new_head_goes_on_the_towers_of_a_checkpoint(features_root, tmp_path):
    assert main(options(features_root, tmp_path, "--epochs=1", "--similarity=cosine")) == 0
    best, data = tmp_path / "run" / "best", [f"--data-root={features_root}", f"--logs={tmp_path}", "--name=esl"]
    argv = [f"--checkpoint={best}", "--similarity=esl-adaptive", "--num-levels=2", "--freeze-image", "--freeze-text"]
    with pytest.warns(UserWarning, match="a new head .similarity esl-adaptive, kernel_size 2, num_levels 2. on the"):
        assert main(["--dataset=features", *data, *argv, "--epochs=1", "--batch-size=32"]) == 0
    before, after = load_checkpoint(best), load_checkpoint(tmp_path / "esl" / "last")
    assert after.config.similarity == "esl-adaptive"
    assert len(after.head.degrees()) == 3
    for tower in ("image_tower", "text_tower"):
        weights = getattr(after, tower).state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in getattr(before, tower).state_dict().items())


def test_a_run_may_start_from_an_official_checkpoint(pictures_root, tmp_path, capsys):
    tiny = checkpoint.read_pth(Path(__file__).parent / "golden" / "official_heuristic_tiny.pth")["state_dict"]
    width = tiny["clip.token_embedding.weight"].shape[1]
    tiny["clip.token_embedding.weight"] = 0.02 * torch.randn(49408, width)  # it knows only the first tokens
    official = tmp_path / "official.pth"
    torch.save({"epoch": 1, "state_dict": tiny}, official)
    data = ["--dataset=karpathy", f"--data-root={pictures_root}", f"--logs={tmp_path}", "--batch-size=100"]
    argv = [*data, "--name=tuned", f"--checkpoint={official}", "--epochs=1", "--evals-per-epoch=1", "--workers=0"]
    assert main([*argv, f"--model={pictures_root / 'tiny.json'}"]) == 2
    assert "the towers of" in capsys.readouterr().err
    assert main([*argv, "--lr=1e-3"]) == 0
    config = yaml.safe_load((tmp_path / "tuned" / "train.yaml").read_text())
    assert (config["similarity"], config["model"], config["pretrained"]) == ("esl-heuristic", None, None)
    given, tuned = load_checkpoint(official), load_checkpoint(tmp_path / "tuned" / "last")
    assert tuned.config.clip["vision_cfg"] == given.config.clip["vision_cfg"]
    assert not torch.equal(tuned.image_tower.proj, given.image_tower.proj)


def test_a_loss_that_is_not_finite_ends_the_run(features_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "contrastive_loss", lambda *a, **k: a[0].sum() * float("nan"))
    assert main(options(features_root, tmp_path)) == 2
    assert "the loss is nan at step 1" in capsys.readouterr().err


@pytest.mark.parametrize("evals", [1, 9], ids=["in training", "in validation"])
def test_a_run_that_diverges_says_what_to_try(features_root, tmp_path, capsys, evals):
    argv = ["--lr=1e30", "--warmup=0", "--log-every=20", f"--evals-per-epoch={evals}"]
    assert main(options(features_root, tmp_path, *argv)) == 2
    error = capsys.readouterr().err
    assert "non-finite" in error
    assert "try a lower lr" in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bogus=1"], "bogus"),
        (["--epochs=some"], "epochs"),
        (["--similarity=dot"], "similarity"),
    ],
)
def test_unknown_options_are_named(argv, message, capsys):
    with pytest.raises(SystemExit):
        parse(argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs=0"], "epochs is 0; expected at least 1"),
        (["--seed=-1"], "seed is -1; expected 0 to 4294967295"),
        (["--device=cuda:77"], "cuda:77"),
        (["--dataset=flickr30k"], "say where with --data-root"),
        (["--dataset=karpathy", "--data-root=/nowhere"], "/nowhere"),
        (["--model=ViT-Z-99"], "ViT-Z-99"),
        (["--resume=/nowhere"], "nothing to resume"),
        (["--data-root=/some"], "--data-root is given, but data set 'synthetic' takes none"),
        (["--dataset=coco", "--data-root=/some", "--features=x.npy"], "--features is given, but data set 'coco'"),
        (["--logs=/proc/nowhere"], "cannot write into /proc/nowhere"),
        (["--device=mps"], "device is 'mps'; accepted: auto, cpu, cuda, cuda:N"),
        ([f"--pretrained={__file__}"], "test_training.py', which holds no weights of esl-tiny"),
        (["--pretrained=nowhere"], "'none' starts from random weights"),
        (["--embed-dim=100"], "embed_dim is 100; the open_clip tower's is 256"),
        (["--checkpoint=/nowhere"], "no checkpoint at /nowhere"),
        (["--model=null"], "model is None, which goes with a checkpoint only"),
    ],
)
def test_bad_input_is_one_line(argv, message, tmp_path, capsys):
    logs = [] if any(arg.startswith("--logs") for arg in argv) else [f"--logs={tmp_path}"]
    assert main([*argv, *logs]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())  # no run's folder stays behind


@pytest.mark.parametrize("option", ["dataset", "recipe", "grad_clip", "loss", "epochs"])
def test_an_option_that_cannot_be_null(option, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"{option}: null\n")
    with pytest.raises(ValueError, match=f"{option} is (null|None)"):
        parse([f"--config={file}"])
    file.write_text(f"# {option}\n")
    assert parse([f"--config={file}"]) == parse([])


def test_another_folder_has_files_of_its_own(features_root, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(features_root, other)
    np.save(other / "image_features.npy", np.load(other / "image_features.npy")[::-1])
    named = {"features": features_root / "image_features.npy", "annotations": features_root / "dataset_tiny.json"}
    files = [f"--{name}={path}" for name, path in named.items()]
    assert main(options(features_root, tmp_path, "--epochs=1", *files)) == 0
    results = []
    for more in ([], [f"--data-root={other}"], [f"--data-root={other}", "--dataset=features"]):
        argv = [f"--checkpoint={tmp_path / 'run' / 'best'}", f"--output={tmp_path / 'metrics.json'}", *more]
        assert evaluate_main(argv) == 0
        results.append(json.loads((tmp_path / "metrics.json").read_text()))
    assert results[0]["metrics"] != results[1]["metrics"] == results[2]["metrics"]
    assert (results[1]["data_root"], results[1]["features"], results[1]["rerank"]) == (str(other), None, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no options"), ("a: [", "cannot be read as YAML"), ("dataset: regionz", "dataset: regionz; accepted")],
)
def test_a_run_whose_options_are_damaged(content, message, tmp_path, capsys):
    (tmp_path / "best").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "best" / name).write_text("{}")
    (tmp_path / "train.yaml").write_text(content)
    assert evaluate_main([f"--checkpoint={tmp_path / 'best'}"]) == 2
    assert message in capsys.readouterr().err


def test_a_config_file_is_overridden_by_the_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("dataset: features\nepochs: 7\nlr: 0.5\n")
    config = parse([f"--config={file}", "--lr", "0.25"])
    assert (config.epochs, config.lr, config.text_tower) == (7, 0.25, "bag")


@pytest.mark.parametrize("form", [lambda file: [f"--config={file}"], lambda file: ["--config", str(file)]])
def test_a_config_file_may_say_options_as_the_command_line_does(tmp_path, form):
    file = tmp_path / "run.yaml"
    file.write_text("batch-size: 33\ndata_root: /some/where\nfreeze-image: true\nhead-lr: 1e-3\nname: 2024-06-01\n")
    config = parse(form(file))
    given = config.batch_size, config.data_root, config.freeze_image, config.head_lr, config.name
    assert given == (33, "/some/where", True, 1e-3, "2024-06-01")
    file.write_text("batch-size: 33\nbatch_size: 34\n")
    with pytest.raises(ValueError, match="says an option twice"):
        parse(form(file))
    file.write_text("dataset: features\nlearning_rate: 7\n")
    with pytest.raises(SystemExit):
        parse([f"--config={file}"])


def test_the_official_recipe_is_the_default_on_the_official_data():
    for dataset in ("flickr30k", "coco", "karpathy"):
        config = parse([f"--dataset={dataset}"])
        assert (config.model, config.pretrained, config.seed) == ("ViT-B-16", "openai", 24)
        assert (config.lr, config.head_lr, config.wd, config.eps) == (1e-6, 3e-5, 0.2, 1e-6)
        assert (config.batch_size, config.epochs, config.warmup, config.grad_clip) == (64, 15, 0.1, 1.0)


def test_the_learning_rate_rises_and_falls():
    factors = [lr_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:3] == [0.1, 0.2, pytest.approx(0.3)]
    assert max(factors) == factors[9] == 1
    assert factors[55] == pytest.approx(0.5)
    assert factors[99] < 1e-3


def test_selection_never_looks_at_test(features_root, tmp_path):
    config = TrainConfig(
        dataset="features", data_root=str(features_root), embed_dim=32, num_levels=3, text_tower="bag", epochs=1
    )
    data = build_data(config)
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    seed_everything(0)

    class Forbidden:
        def __getattr__(self, name):
            raise AssertionError("the test split was touched")

    data.test = Forbidden()
    one = Trainer(config, data, build_model(config, data), run)
    with pytest.raises(AssertionError, match="touched"):
        one.fit()
    assert one.step == one.total_steps
    assert find_run(str(run / "best"), str(tmp_path)) == run
