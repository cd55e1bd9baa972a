"""Checkpoints, our own and official: exact, atomic, and never executed."""

import builtins
import errno
import json
import os
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers import RESNET, clip_config, features_model, golden_files, relative_error, small_model
from safetensors.torch import load_file

import esl_fast
from esl_fast.files import replacing
from esl_fast.model import CheckpointError, checkpoint, towers

OFFICIAL = [pytest.param(path, id=path.stem) for path in golden_files("official_*_tiny.pth")]


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


@pytest.fixture
def model():
    return features_model()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "best"


# Our own


MODELS = {
    "open_clip": lambda: small_model(clip=clip_config(preprocess=towers.default_preprocess())),
    "features": lambda: features_model("esl-adaptive"),
    "cosine": lambda: features_model("cosine"),
    "float64": lambda: features_model().double(),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_save_and_load(make, folder):
    model = make()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 1e-3)
    esl_fast.save_checkpoint(model, folder)
    again = esl_fast.load_checkpoint(folder)
    assert same_weights(again, model)
    assert not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert json.dumps(again.config.to_dict()) == json.dumps(model.config.to_dict())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


def test_any_way_to_name_it(model, folder, monkeypatch):
    esl_fast.save_checkpoint(model, str(folder))
    monkeypatch.chdir(folder)
    for path in (str(folder), folder / "model.safetensors", ".", Path("../best"), "model.safetensors"):
        assert same_weights(esl_fast.load_checkpoint(path), model)


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
        esl_fast.load_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_folder_that_is_no_checkpoint(model, folder, missing):
    esl_fast.save_checkpoint(model, folder)
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=f"best is not a checkpoint: it has no {missing}"):
        esl_fast.load_checkpoint(folder)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(**changes):
    def apply(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


DAMAGE = {
    "short weights": ("model.safetensors", truncate, ""),
    "empty weights": ("model.safetensors", lambda path: path.write_bytes(b""), ""),
    "garbage weights": ("model.safetensors", lambda path: path.write_bytes(bytes(range(256))), ""),
    "short config": ("config.json", truncate, ""),
    "binary config": ("config.json", lambda path: path.write_bytes(b"\xff\xfe\x00"), ""),
    "config is a list": ("config.json", lambda path: path.write_text("[1]"), ""),
    "unknown key": ("config.json", edit(colour="red"), "colour"),
    "wrong sizes": ("config.json", edit(feature_dim=13), "size mismatch"),
    "incomplete clip": ("config.json", edit(image_tower="open_clip", clip={}), "embed_dim"),
    "clip is a name": ("config.json", edit(image_tower="open_clip", clip="ViT-B-16"), ""),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged(model, folder, name, damage, message):
    esl_fast.save_checkpoint(model, folder)
    damage(folder / name)
    with pytest.raises(CheckpointError, match=f"(?s)cannot read checkpoint .*best: .*{message}"):
        esl_fast.load_checkpoint(folder)


# Replacing a folder as a whole


@pytest.fixture
def saved(model, folder):
    """A checkpoint and a model to replace it with."""
    esl_fast.save_checkpoint(model, folder)
    return model, features_model("cosine")


def only(folder):
    return [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_replaced(saved, folder):
    esl_fast.save_checkpoint(saved[1], folder)
    assert same_weights(esl_fast.load_checkpoint(folder), saved[1])
    assert only(folder)


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_files_are_as_readable_as_the_umask_says(model, folder, umask):
    before = os.umask(umask)
    try:
        esl_fast.save_checkpoint(model, folder)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}


FULL_DISK = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [FULL_DISK, KeyboardInterrupt(), RuntimeError("shared memory")], ids=repr)
def test_failure_in_the_middle_keeps_the_old(saved, folder, monkeypatch, error):
    def fail(weights, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(type(error)):
        esl_fast.save_checkpoint(saved[1], folder)
    assert only(folder)
    assert same_weights(esl_fast.load_checkpoint(folder), saved[0])


@pytest.mark.parametrize("name", ["fsync", "rename"])
def test_full_disk_at_the_end_keeps_the_old(saved, folder, monkeypatch, name):
    def fail(*args):
        raise FULL_DISK

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "rename": (Path, "rename")}[name], fail)
    with pytest.raises(OSError, match="No space left"):
        esl_fast.save_checkpoint(saved[1], folder)
    assert only(folder)
    assert same_weights(esl_fast.load_checkpoint(folder), saved[0])


@pytest.mark.parametrize("named", ["", "model.safetensors"])
def test_killed_between_the_renames(saved, folder, named):
    with replacing(folder.with_name("other")) as new:
        checkpoint.write_model(saved[1], new)
        new.rename(folder.with_name("best.tmp-1"))  # what a killed process leaves behind
        new.mkdir()
    folder.rename(folder.with_name("best.old"))
    assert same_weights(esl_fast.load_checkpoint(folder / named), saved[0])
    folder.with_name("other").rmdir()
    esl_fast.save_checkpoint(saved[1], folder)
    assert same_weights(esl_fast.load_checkpoint(folder), saved[1])
    assert only(folder)


def test_failing_second_rename(saved, folder, monkeypatch):
    rename = Path.rename

    def fail(path, target):
        if ".tmp-" in path.name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(PermissionError):
        esl_fast.save_checkpoint(saved[1], folder)
    assert same_weights(esl_fast.load_checkpoint(folder), saved[0])


def test_unwritable_folder(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        esl_fast.save_checkpoint(model, tmp_path / "file" / "best")


# Official


class AllConfig:
    """What the official code pickles beside its weights."""

    def __init__(self):
        self.num_epochs, self.paths = 15, {"output": "/home/someone/outputs"}


@pytest.fixture
def all_config(monkeypatch):
    """An instance that pickles under the official module's name."""
    module = types.ModuleType("config.all_config")
    module.AllConfig = AllConfig
    monkeypatch.setattr(AllConfig, "__module__", "config.all_config")
    monkeypatch.setitem(sys.modules, "config", types.ModuleType("config"))
    monkeypatch.setitem(sys.modules, "config.all_config", module)
    return AllConfig()


def official_weights(model, prefix=""):
    """A model's weights as the official code names them."""
    state = {"logit_scale": model.logit_scale.data, **model.text_tower.state_dict()}
    state |= {f"visual.{key}": value for key, value in model.image_tower.state_dict().items()}
    state = {f"clip.{key}": value for key, value in state.items()} | model.head.to_official()
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("path", OFFICIAL)
def test_official_similarity(path):
    expected = load_file(path.with_name(f"{path.stem}_expected.safetensors"))
    model = esl_fast.load_checkpoint(path)
    with torch.no_grad():
        assert relative_error(model.encode_image(expected["images"]), expected["image_features"]) <= 1e-4
        assert relative_error(model.encode_text(expected["text"]), expected["text_features"]) <= 1e-4
        assert relative_error(model(expected["images"], expected["text"]), expected["similarity"]) <= 1e-4
    assert model.image_transform is not None
    assert torch.equal(model.tokenize(["a dog"])[0, -1:], torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("aggregator", "vision", "prefix"), [("heuristic", {}, "module."), ("adaptive", {}, ""), ("heuristic", RESNET, "")]
)
def test_official_towers_of_any_size(aggregator, vision, prefix, tmp_path, all_config):
    clip = clip_config(vision_cfg=vision or clip_config()["vision_cfg"])
    model = small_model(clip=clip, similarity=f"esl-{aggregator}")
    model.logit_scale.data.fill_(3.25)
    contents = {"epoch": 3, "state_dict": official_weights(model, prefix), "optimizer": {"state": {}, "lr": 1e-6}}
    torch.save(contents | {"config": all_config}, tmp_path / "model_best.pth")
    sys.modules.pop("config.all_config")  # the reader has no such source
    again = esl_fast.load_checkpoint(tmp_path / "model_best.pth")
    assert same_weights(again, model)
    assert again.config.clip["vision_cfg"] == clip["vision_cfg"]
    assert again.config.clip["quick_gelu"]
    images, tokens = torch.randn(2, 3, 32, 32), again.tokenize(["a dog", "a cat"])
    with torch.no_grad():
        assert torch.equal(again(images, tokens), model(images, tokens))
    # and once more, in our own format
    esl_fast.save_checkpoint(again, tmp_path / "own")
    assert same_weights(esl_fast.load_checkpoint(tmp_path / "own"), model)


def test_official_configuration_is_inert(tmp_path, all_config):
    torch.save({"config": all_config}, tmp_path / "a.pth")
    config = checkpoint.read_pth(tmp_path / "a.pth")["config"]
    assert type(config) is checkpoint._Inert
    assert vars(config) == vars(all_config)


class Hostile:
    """Calls something when unpickled."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def zip_archive(contents, path):
    torch.save(contents, path)


def old_format(contents, path):
    torch.save(contents, path, _use_new_zipfile_serialization=False)


def plain_pickle(contents, path):
    path.write_bytes(pickle.dumps(contents, protocol=2))


@pytest.mark.parametrize("write", [zip_archive, old_format, plain_pickle])
@pytest.mark.parametrize(
    "call", [lambda p: (os.mkdir, p), lambda p: (builtins.open, p, "w"), lambda p: (eval, f"open({p!r}, 'w')")],
    ids=["mkdir", "open", "eval"],
)  # fmt: skip
def test_hostile_file_is_refused(tmp_path, write, call):
    marker, path = tmp_path / "it ran", tmp_path / "model.pth"
    write({"state_dict": {}, "config": Hostile(*call(str(marker)))}, path)
    with pytest.raises(CheckpointError, match=r"refused to load .*model\.pth"):
        esl_fast.load_checkpoint(path)
    assert not marker.exists()


def test_a_refusal_names_the_call(tmp_path):
    zip_archive({"config": Hostile(os.mkdir, "x")}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"it would run (posix|nt)\.mkdir; only tensors and plain data are read"):
        esl_fast.load_checkpoint(tmp_path / "model.pth")


def without(*parts):
    return lambda weights: {k: v for k, v in weights.items() if not any(part in k for part in parts)}


UNSUITABLE = {
    "no head": (without("pool_frames"), "not an ESL head"),
    "no towers": (without("clip."), "clip.visual"),
    "no temperature": (without("logit_scale"), "logit_scale"),
    "a layer short": (without("clip.visual.transformer.resblocks.0.ln_1"), "ln_1"),
    "no projection": (without("visual.proj"), "no tensor 'clip.visual.proj'"),
    "misshapen": (lambda w: {k: v[..., 1:] if "ln_final.weight" in k else v for k, v in w.items()}, "num_heads"),
    "empty": (lambda w: {k: v[:0] if "conv1" in k else v for k, v in w.items()}, "conv1"),
    "no tensors": (lambda weights: dict.fromkeys(weights, 1), ""),
    "scalars": (lambda weights: {key: torch.zeros(()) for key in weights}, ""),
    "not a dictionary": (lambda weights: [1, 2], "no `state_dict`"),
}


@pytest.mark.parametrize(("change", "message"), UNSUITABLE.values(), ids=UNSUITABLE)
def test_unsuitable_official_file(change, message, tmp_path):
    torch.save({"state_dict": change(official_weights(small_model()))}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=rf"(?s)other\.pth.*{message}"):
        esl_fast.load_checkpoint(tmp_path / "other.pth")


def test_a_run_is_no_checkpoint_but_holds_one(tmp_path):
    esl_fast.save_checkpoint(small_model(), tmp_path / "run" / "best")
    with pytest.raises(CheckpointError, match=r"did you mean .*run/best\?"):
        esl_fast.load_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("contents", [b"", b"hello", bytes(range(256)) * 9, b"PK\x03\x04" + bytes(99)], ids=len)
def test_not_a_pytorch_file(tmp_path, contents):
    path = tmp_path / "model.pth"
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"refused to load .*model\.pth: not a readable PyTorch checkpoint"):
        esl_fast.load_checkpoint(path)


@pytest.mark.filterwarnings("error")
def test_a_pickle_that_is_no_archive(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(pickle.dumps({"state_dict": print}, protocol=4))
    with pytest.raises(CheckpointError, match="neither an archive nor an older file"):
        esl_fast.load_checkpoint(path)
    with pytest.raises(CheckpointError, match="refused to load"):
        checkpoint.read_pth(tmp_path)


def test_truncated_official_file(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(9999)}}, tmp_path / "model.pth")
    truncate(tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="refused to load"):
        esl_fast.load_checkpoint(tmp_path / "model.pth")
