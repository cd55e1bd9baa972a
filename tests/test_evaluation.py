"""Ranks, metrics and the evaluation protocol."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import clip_config, small_model

from esl_fast.data import Split
from esl_fast.evaluation import chance_rsum, evaluate, ranks_from_similarity, recall_metrics, table
from esl_fast.evaluation.main import EvaluateConfig, collect_checkpoints, main, parse
from esl_fast.model import MatchingModel, ModelConfig, save_checkpoint
from esl_fast.reference.ranks import retrieval_ranks
from esl_fast.scripts import reporting_errors, with_underscores


def arrays(features: np.ndarray, captions_each: int, name: str = "test") -> Split:
    captions = [[f"word{i} number{c}" for c in range(captions_each)] for i in range(len(features))]
    return Split.from_lists(name, features, captions, [str(i) for i in range(len(features))])


def tiny_model(seed: int, similarity: str = "esl-heuristic") -> MatchingModel:
    torch.manual_seed(seed)
    config = ModelConfig(
        similarity=similarity, num_levels=3, image_tower="features", text_tower="bag", feature_dim=6, bag_size=40,
        embed_dim=16,
    )  # fmt: skip
    model = MatchingModel(config)
    model.text_tower.entry_of.copy_(torch.arange(len(model.text_tower.entry_of)) % 40)
    return model


def test_ranks_of_a_matrix_follow_the_definition():
    scores = torch.randint(0, 6, (23, 57)).double()
    owners = torch.randint(0, 23, (57,))
    for ours, expected in zip(ranks_from_similarity(scores, owners), retrieval_ranks(scores, owners), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [np.float16, np.int64], ids=str)
def test_ranks_of_a_matrix_of_any_type(dtype):
    scores = np.random.default_rng(0).integers(0, 3000, (40, 3000)).astype(dtype)  # ranks that float16 cannot count
    if dtype is np.int64:
        scores += 2**24  # numbers that float32 cannot tell apart
    owners = torch.arange(3000) % 40
    expected = retrieval_ranks(torch.from_numpy(scores).double(), owners)
    assert all(map(torch.equal, ranks_from_similarity(scores, owners), expected))


def test_a_constant_matrix_scores_nothing():
    image_ranks, text_ranks = ranks_from_similarity(np.zeros((20, 100)), np.repeat(np.arange(20), 5))
    assert (image_ranks == 99).all()
    assert (text_ranks == 19).all()
    assert recall_metrics(image_ranks, text_ranks)["rsum"] == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_scores_name_their_rows(value):
    scores = np.random.default_rng(0).normal(size=(4, 20))
    scores[2, 7] = value
    with pytest.raises(ValueError, match="non-finite values in 1 of 4 rows: 2"):
        ranks_from_similarity(scores, np.repeat(np.arange(4), 5))


def test_metrics_by_hand():
    metrics = recall_metrics(torch.tensor([0, 4, 9, 30]), torch.tensor([0, 0, 1, 12]))
    assert [metrics[f"i2t_r{k}"] for k in (1, 5, 10)] == [25, 50, 75]
    assert [metrics[f"t2i_r{k}"] for k in (1, 5, 10)] == [50, 75, 75]
    assert metrics["rsum"] == 350
    assert metrics["i2t_median_rank"] == 7.5
    assert metrics["i2t_mean_rank"] == 11.75


def test_chance_is_what_random_scores_give():
    owners = torch.arange(250) // 5
    rsums = [recall_metrics(*ranks_from_similarity(torch.rand(50, 250), owners))["rsum"] for _ in range(200)]
    assert np.mean(rsums) == pytest.approx(chance_rsum(owners), rel=0.05)


def test_chance_of_uneven_images():
    owners = torch.tensor([0, 0, 0, 1, 2, 2])
    rsums = [recall_metrics(*ranks_from_similarity(torch.rand(3, 6), owners))["rsum"] for _ in range(3000)]
    assert np.mean(rsums) == pytest.approx(chance_rsum(owners), rel=0.01)


def test_the_table_holds_every_figure():
    metrics = recall_metrics(torch.tensor([0, 4]), torch.tensor([2, 3]))
    lines = table({"ours": metrics, "cosine": metrics}).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split()[-1] == f"{metrics['rsum']:.1f}"


def test_only_the_first_five_captions_count():
    features = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)
    assert evaluate([lambda: tiny_model(0)], arrays(features, 7))["captions"] == 60


def test_an_ensemble_ranks_the_mean_of_the_matrices(tmp_path):
    features = np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32)
    split = arrays(features, 5)
    for seeds, name in (((0,), "a"), ((1,), "b"), ((0, 1), "both")):
        loads = [lambda seed=seed: tiny_model(seed) for seed in seeds]
        result = evaluate(loads, split, batch_size=7, save_similarity=tmp_path / f"{name}.npy")
    matrices = {name: np.load(tmp_path / f"{name}.npy") for name in ("a", "b", "both")}
    np.testing.assert_allclose(matrices["both"], (matrices["a"] + matrices["b"]) / 2, rtol=1e-4, atol=1e-7)
    assert result["metrics"] == recall_metrics(*ranks_from_similarity(matrices["both"], split.owners))
    names = json.loads((tmp_path / "both.names.json").read_text())
    assert names == {"images": split.image_ids, "captions": split.captions, "owners": split.owners.tolist()}


def test_a_matrix_has_a_list_of_names_to_itself(tmp_path):
    for images in (3, 4):
        split = arrays(np.random.default_rng(0).normal(size=(images, 6)).astype(np.float32), 1)
        evaluate([lambda: tiny_model(0)], split, save_similarity=tmp_path / f"s.v{images}")
    assert len(json.loads((tmp_path / "s.v3.names.json").read_text())["images"]) == 3


def test_five_folds_average_thousand_images_each(tmp_path):
    features = np.random.default_rng(0).normal(size=(5000, 6)).astype(np.float32)
    split = arrays(features, 1)
    result = evaluate([lambda: tiny_model(0)], split, five_folds=True, save_similarity=tmp_path / "s.npy")
    matrix = np.load(tmp_path / "s.npy")
    folds = [
        recall_metrics(*ranks_from_similarity(matrix[i : i + 1000, i : i + 1000], np.arange(1000)))["rsum"]
        for i in range(0, 5000, 1000)
    ]
    assert result["five_folds"]["rsum"] == pytest.approx(np.mean(folds), abs=0.2)
    with pytest.raises(ValueError, match="5 folds take 5000 images; split 'test' has 10"):
        evaluate([lambda: tiny_model(0)], split.subset(range(10)), five_folds=True)


@pytest.mark.parametrize("side", ["image", "text"])
def test_units_that_are_not_finite_are_named(side):
    """Finite features are not enough: a head may make of them what is not."""
    model = tiny_model(0)
    units = getattr(model.head, f"{side}_units")
    setattr(model.head, f"{side}_units", lambda x: units(x).index_fill(0, torch.tensor([2]), torch.nan))
    split = arrays(np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32), 1)
    with pytest.raises(ValueError, match=r"units of .* non-finite values in 1 of 4 rows: 2"):
        evaluate([lambda: model], split)


@pytest.mark.parametrize(
    ("option", "message"),
    [("--output=.", "--output . cannot be written"), ("--save-similarity=.", "--save-similarity . cannot be written"),
     ("--shortlist=x", "--shortlist is given without --rerank"), ("--rerank=0", "rerank is 0; expected at least 1"),
     ("--batch-size=0", "batch_size is 0"), ("--workers=-1", "workers is -1"), ("--device=mps", "device is 'mps'"),
     ("--split=val", "no checkpoint at nowhere")],
)  # fmt: skip
def test_options_are_looked_at_before_the_work(option, message, capsys):
    assert main(["--checkpoint=nowhere", option]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("output", ["./s.npy", "../there/s.npy", "s.names.json"])
def test_one_file_is_not_written_twice(output, tmp_path, monkeypatch, capsys):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    assert main(["--checkpoint=nowhere", "--save-similarity=s.npy", f"--output={output}"]) == 2
    assert f"--output {Path(output)} is a file that --save-similarity s.npy writes" in capsys.readouterr().err


def test_a_run_is_not_evaluated_for_its_best(tmp_path, capsys):
    save_checkpoint(tiny_model(0), tmp_path / "run" / "best")
    assert main([f"--checkpoint={tmp_path / 'run'}"]) == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "the data set has pixels; the model takes features of 6 numbers"),
        ({"image_tower": "regions"}, "the data set has pixels; the model takes regions of 6 numbers"),
    ],
)
def test_a_checkpoint_must_fit_the_data(changes, message, tmp_path, capsys):
    save_checkpoint(MatchingModel(replace(tiny_model(0).config, **changes)), tmp_path / "model")
    assert main([f"--checkpoint={tmp_path / 'model'}", "--dataset=synthetic"]) == 2
    assert message in capsys.readouterr().err


def test_models_say_what_fits():
    model = tiny_model(0)
    model.check_fits("features", 6)
    with pytest.raises(ValueError, match="has features of 7 numbers; the model takes features of 6"):
        model.check_fits("features", 7)
    clip = clip_config(text_cfg=clip_config()["text_cfg"] | {"vocab_size": 64})
    with pytest.raises(ValueError, match="knows 64 tokens"):
        small_model(clip=clip).check_fits("pixels", None)


def test_errors_of_worker_processes_are_one_line(capsys):
    def run():
        raise ValueError("Caught DataError in DataLoader worker process 0.\nOriginal Traceback\nDataError: a: bad\n")

    assert reporting_errors(run) == 2
    assert capsys.readouterr().err == "error: a: bad\n"


def test_switches_need_no_value():
    assert with_underscores(["--five-folds", "--output", "a"], EvaluateConfig) == ["--five_folds=true", "--output", "a"]
    assert with_underscores(["--five-folds"], EvaluateConfig) == ["--five_folds=true"]
    assert with_underscores([], EvaluateConfig) == []
    given = ["--five-folds", "false", "--save-similarity=a-b"]
    assert with_underscores(given, EvaluateConfig) == ["--five_folds", "false", "--save_similarity=a-b"]


def test_checkpoints_may_follow_one_option_or_several():
    both = ["--split=val", f"--checkpoint={json.dumps(['a', 'b'])}"]
    assert collect_checkpoints(["--checkpoint", "a", "b", "--split=val"]) == both
    assert collect_checkpoints(["--checkpoint", "a", "--split=val", "--checkpoint=b"]) == both
    assert collect_checkpoints(["--checkpoint=[a, 'b']", "--split=val"]) == both
    assert collect_checkpoints(["--checkpoint=a", "b", "--split=val"]) == both


def test_a_file_names_one_checkpoint_or_several(tmp_path):
    file = tmp_path / "evaluate.yaml"
    for written, meant in (("a", ["a"]), ("[a, b]", ["a", "b"])):
        file.write_text(f"checkpoint: {written}\n")
        assert parse([f"--config={file}"]).checkpoint == meant
