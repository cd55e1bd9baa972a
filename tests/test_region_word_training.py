"""Region-word models trained and evaluated end to end on small data; size augmentation, losses, recipes."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from helpers import features_model

from esl_fast import load_checkpoint
from esl_fast.data import SizeAugmentation, load_dataset
from esl_fast.evaluation import evaluate, ranks_from_similarity, recall_metrics
from esl_fast.evaluation.main import main as evaluate_main
from esl_fast.model import REGION_WORD_SIMILARITIES
from esl_fast.model.scores import RegionWordScores
from esl_fast.model.sequences import SpecialTokens
from esl_fast.training import TrainConfig, Trainer, main
from esl_fast.training.accumulate import backward_in_parts
from esl_fast.training.config import parse, recipe_name
from esl_fast.training.optim import lr_factor, make_optimizer
from esl_fast.training.runs import read_metrics

WORDS = ["red", "blue", "green", "dog", "cat", "bird", "runs", "sits", "jumps", "house", "tree", "lake"]


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """60 / 20 / 20 images of 5 regions, each region a noisy word of the image's captions."""
    folder = tmp_path_factory.mktemp("regions")
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(len(WORDS), 10))
    for split, count in (("train", 60), ("dev", 20), ("test", 20)):
        chosen = [rng.choice(len(WORDS), 5, replace=False) for _ in range(count)]
        regions = np.stack([maps[words] for words in chosen]) + 0.1 * rng.normal(size=(count, 5, 10))
        np.save(folder / f"{split}_ims.npy", regions.astype(np.float16))
        lines = [" ".join(WORDS[w] for w in rng.permutation(words)[:4]) for words in chosen for _ in range(5)]
        (folder / f"{split}_caps.txt").write_text("\n".join(lines) + "\n")
    return folder


def options(root, logs, *more):
    return [
        "--dataset=regions", f"--data-root={root}", f"--logs={logs}", "--name=run", "--embed-dim=32", "--num-levels=3",
        "--epochs=3", "--batch-size=32", "--log-every=1", *more,
    ]  # fmt: skip


def losses(run):
    return [entry["loss"] for entry in read_metrics(run) if entry["kind"] == "train"]


@pytest.mark.parametrize("loss", ["hinge", "infonce"])
@pytest.mark.parametrize("similarity", [*REGION_WORD_SIMILARITIES, "cosine"])
def test_a_run_learns_and_is_evaluated_again(root, tmp_path, similarity, loss):
    argv = options(root, tmp_path, "--epochs=14", "--lr=0.01", f"--similarity={similarity}", f"--loss={loss}")
    assert main(argv) == 0
    run = tmp_path / "run"
    result = json.loads((run / "results.json").read_text())
    assert result["metrics"]["rsum"] > 2 * result["chance_rsum"]
    output = tmp_path / "metrics.json"
    again = [f"--checkpoint={run / 'best'}", "--dataset=regions", f"--data-root={root}", f"--output={output}"]
    assert evaluate_main(again) == 0
    assert json.loads(output.read_text())["metrics"] == result["metrics"]


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_by_bit(root, tmp_path, monkeypatch):
    argv = ["--similarity=region-word-heuristic", "--loss=hinge", "--hinge-epochs=1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(options(root, whole, *argv)) == 0

    steps = 0
    step = Trainer._train_step

    def interrupted(self, batch):
        nonlocal steps
        steps += 1
        if steps in (5, 13):
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    assert main(options(root, broken, *argv)) == 128 + signal.SIGINT
    assert main(["--resume=latest", f"--logs={broken}"]) == 128 + signal.SIGINT
    assert main(["--resume=latest", f"--logs={broken}"]) == 0
    assert losses(broken / "run") == losses(whole / "run")
    ours, theirs = (load_checkpoint(logs / "run" / "last").state_dict() for logs in (whole, broken))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("loss", ["hinge", "infonce"])
def test_accumulation_sees_the_whole_batch(root, tmp_path, loss):
    for freq in (1, 3):
        # A frozen tower, since statistics of a batch norm are those of a part.
        more = ["--similarity=region-word-heuristic", f"--loss={loss}", f"--accum-freq={freq}", "--freeze-image=true"]
        assert main(options(root, tmp_path / str(freq), *more, "--grad-clip=0", "--epochs=2", "--lr=1e-4")) == 0
    once, thrice = losses(tmp_path / "1" / "run"), losses(tmp_path / "3" / "run")
    np.testing.assert_allclose(once, thrice, rtol=1e-3)


def test_accumulation_counts_statistics_once():
    norm = torch.nn.BatchNorm1d(4)

    def encode(chunk):
        return norm(chunk["image"]), chunk["tokens"]

    batch = {"image": torch.randn(12, 4), "tokens": torch.randn(12, 4)}
    backward_in_parts(
        batch, 3, model=norm, encode=encode, loss_of=lambda x, y: (x * y).sum(), scale=lambda loss: loss
    )
    once = torch.nn.BatchNorm1d(4)
    for chunk in batch["image"].chunk(3):
        once(chunk)
    torch.testing.assert_close(dict(norm.named_buffers()), dict(once.named_buffers()))


def test_only_the_hardest_negatives_count_after_the_first_epochs(root, tmp_path, monkeypatch):
    seen, whole = [], RegionWordScores.hinge_loss

    def recorded(self, ids, *, margin, hardest):
        seen.append((hardest, margin, ids is None))
        return whole(self, ids, margin=margin, hardest=hardest)

    monkeypatch.setattr(RegionWordScores, "hinge_loss", recorded)
    argv = ["--loss=hinge", "--hinge-epochs=2", "--margin=0.3", "--same-image=negative"]
    argv += ["--similarity=region-word-adaptive"]
    assert main(options(root, tmp_path, *argv)) == 0
    steps = 300 // 32
    assert seen == [(False, 0.3, True)] * 2 * steps + [(True, 0.3, True)] * steps


# Evaluation


@pytest.fixture(scope="session")
def runs(root, tmp_path_factory):
    """Checkpoints of a region-word run and of a cosine."""
    logs = tmp_path_factory.mktemp("runs")
    for similarity in ("region-word-heuristic", "cosine"):
        argv = options(root, logs, f"--similarity={similarity}", f"--name={similarity}", "--epochs=6", "--lr=0.01")
        assert main(argv) == 0
    return logs / "region-word-heuristic" / "best", logs / "cosine" / "best"


@pytest.fixture
def split(root):
    return load_dataset("regions", root).test


def test_an_ensemble_ranks_the_mean_of_the_matrices(runs, split, tmp_path):
    loads = [lambda path=path: load_checkpoint(path) for path in runs]
    for chosen, name in ((loads[:1], "a"), (loads[1:], "b"), (loads, "both")):
        result = evaluate(chosen, split, batch_size=7, save_similarity=tmp_path / f"{name}.npy")
    matrices = {name: np.load(tmp_path / f"{name}.npy") for name in ("a", "b", "both")}
    np.testing.assert_allclose(matrices["both"], (matrices["a"] + matrices["b"]) / 2, rtol=1e-4, atol=1e-6)
    assert result["metrics"] == recall_metrics(*ranks_from_similarity(matrices["both"], split.owners))


def test_reranking(runs, split, root, tmp_path):
    region_word, cosine = (lambda path=path: load_checkpoint(path) for path in runs)
    everything = evaluate([region_word], split, rerank=100)["metrics"]
    # Captions of the same words tie, which rounding decides; images do not.
    expected = evaluate([region_word], split)["metrics"]
    assert {k: v for k, v in everything.items() if "t2i" in k} == {k: v for k, v in expected.items() if "t2i" in k}
    first = evaluate([cosine], split)["metrics"]
    assert evaluate([region_word], split, rerank=1, shortlist=cosine)["metrics"]["t2i_r1"] == first["t2i_r1"]
    output = tmp_path / "metrics.json"
    argv = [f"--checkpoint={runs[0]}", f"--shortlist={runs[1]}", "--rerank=5", f"--output={output}"]
    assert evaluate_main([*argv, "--dataset=regions", f"--data-root={root}"]) == 0
    assert json.loads(output.read_text())["metrics"]["t2i_r5"] == first["t2i_r5"]


def test_what_cannot_be_reranked(runs, split, tmp_path):
    region_word, cosine = (lambda path=path: load_checkpoint(path) for path in runs)
    with pytest.raises(ValueError, match="this checkpoint's similarity is a global one"):
        evaluate([cosine], split, rerank=5)
    with pytest.raises(ValueError, match="a shortlist is found by a global similarity"):
        evaluate([region_word], split, rerank=5, shortlist=region_word)
    with pytest.raises(ValueError, match="rerank takes one model"):
        evaluate([region_word, cosine], split, rerank=5)


# Size augmentation

SPECIAL = SpecialTokens(90, 91, 92)


def item(caption=0, words=6, regions=8):
    tokens = torch.zeros(words + 4, dtype=torch.int64)
    tokens[: words + 2] = torch.tensor([90, *range(1, words + 1), 91])
    return {"image": torch.arange(1.0, regions + 1)[:, None].expand(-1, 3), "tokens": tokens, "caption_index": caption}


def augmentation(**changes):
    vocabulary = torch.tensor([[90, 50, 51, 52, 91, 0]])
    return SizeAugmentation(vocabulary, SPECIAL, **({"starts": np.ones_like, "seed": 3, "probability": 0.2} | changes))


def test_augmentation_keeps_its_proportions():
    augment, counts, words, regions = augmentation(), [0, 0, 0], 0, 0
    for caption in range(2000):
        given = item(caption)
        changed = augment(given)
        assert torch.equal(given["tokens"], item(caption)["tokens"])
        inside = changed["tokens"].tolist()
        assert inside[0] == 90
        inside = inside[1 : inside.index(91)]
        counts[0] += inside.count(92)
        counts[1] += sum(word in (50, 51, 52) for word in inside)
        counts[2] += 6 - len(inside)
        words += 6
        kept = [word for word in inside if word < 10]
        assert kept == sorted(kept)
        left = changed["image"][: changed["image_lengths"], 0].tolist()
        assert left == sorted(left)
        assert not changed["image"][changed["image_lengths"] :].any()
        regions += len(left)
    np.testing.assert_allclose(np.array(counts) / words, [0.1, 0.02, 0.08], rtol=0.15)
    assert regions / 16000 == pytest.approx(0.8, abs=0.02)


def test_pieces_of_a_word_share_its_fate():
    augment = augmentation(starts=lambda ids: ids % 2 == 1, probability=0.9)  # words of two pieces: 1 2, 3 4, 5 6
    fates = set()
    for caption in range(200):
        tokens = augment(item(caption))["tokens"].tolist()
        pieces = tokens[1 : tokens.index(91)]
        assert len(pieces) % 2 == 0
        for first, second in zip(pieces[::2], pieces[1::2], strict=True):
            masked, replaced = [x == 92 for x in (first, second)], [x in (50, 51, 52) for x in (first, second)]
            assert masked[0] == masked[1]
            assert replaced[0] == replaced[1]
            assert masked[0] or replaced[0] or second == first + 1
            fates.add((masked[0], replaced[0]))
    assert len(fates) == 3


def test_words_of_clip_begin_where_another_ends():
    model = features_model()
    tokens = model.tokenize(["two rhododendrons bloom"])[0].numpy()
    starts = model.word_starts(tokens[1 : int(tokens.argmax())])
    assert starts.sum() == 3
    assert len(starts) > 3


def test_augmentation_is_a_function_of_seed_epoch_and_caption():
    def drawn(seed, epoch, caption):
        augment = augmentation(seed=seed)
        augment.epoch = epoch
        changed = augment(item(caption, words=30, regions=36))
        return changed["tokens"].tolist(), changed["image"].tolist()

    assert drawn(1, 2, 3) == drawn(1, 2, 3)
    assert all(drawn(1, 2, 3)[i] != drawn(*other)[i] for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)) for i in (0, 1))


def test_one_word_and_one_region_remain():
    augment = augmentation(probability=0.999)
    for caption in range(200):
        changed = augment(item(caption, words=2, regions=2))
        assert changed["image_lengths"] >= 1
        assert changed["tokens"][1] not in (0, 91)
    empty = item(words=0) | {"image": torch.randn(3, 4, 4)}  # pixels have no regions to drop
    assert torch.equal(augment(empty)["tokens"], empty["tokens"])
    assert torch.equal(augment(empty)["image"], empty["image"])
    with pytest.raises(ValueError, match="probability must lie between 0 and 1"):
        augmentation(probability=1.0)


# Recipes and options


def test_the_recipe_follows_the_data(root, tmp_path):
    assert recipe_name("regions", str(root)) == "regions"
    assert recipe_name("coco") == "official"
    assert recipe_name("synthetic") == "synthetic"
    captions = tmp_path / "train_caps.txt"
    for images, name in ((2_000, "regions"), (10_000, "region-word")):
        captions.write_text("a dog\n" * 5 * images)
        for rows in (images, 5 * images):
            np.save(tmp_path / "train_ims.npy", np.zeros((rows, 1, 1), dtype=np.float16))
            assert recipe_name("regions", str(tmp_path)) == name


def test_the_official_recipe():
    config = parse(["--dataset=regions", "--recipe=region-word"])
    assert (config.similarity, config.text_tower, config.embed_dim) == ("region-word-heuristic", "bert", 512)
    assert (config.lr, config.head_lr, config.bert_lr, config.wd) == (5e-4, 5e-4, 5e-5, 1e-4)
    assert (config.batch_size, config.epochs, config.grad_clip) == (128, 30, 2.0)
    assert (config.schedule, config.decay_epoch, config.warmup) == ("step", 15, 0)
    assert (config.objective, config.margin, config.hinge_epochs, config.size_augmentation) == ("hinge", 0.2, 1, 0.2)


def test_the_loss_follows_the_similarity():
    assert TrainConfig().objective == "infonce"
    assert TrainConfig(similarity="region-word-adaptive").objective == "hinge"
    assert TrainConfig(similarity="region-word-adaptive", loss="infonce").objective == "infonce"


def test_the_learning_rate_falls_in_a_step():
    assert [lr_factor(step, 30, 0.0, 15) for step in (0, 14, 15, 29)] == [1, 1, 0.1, 0.1]
    assert lr_factor(0, 30, 0.1, 15) == pytest.approx(1 / 3)


def test_bert_has_a_learning_rate_of_its_own():
    model = torch.nn.Module()
    model.text_tower = torch.nn.Module()
    model.text_tower.bert, model.text_tower.linear, model.head = (torch.nn.Linear(n, 1, bias=False) for n in (2, 3, 4))
    groups = make_optimizer(model, TrainConfig(lr=3.0, head_lr=4.0, bert_lr=2.0)).param_groups
    assert {group["params"][0].shape[1]: group["peak_lr"] for group in groups} == {2: 2.0, 3: 3.0, 4: 4.0}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--text-tower=bert"], "say with --bert"),
        (["--bert=/nowhere"], "no folder of a BERT model: it has no config.json"),
        (["--bert=/nowhere", "--recipe=regions"], "bert is '/nowhere', but text_tower is 'words'"),
        (["--text-tower=bert", "--bert=/nowhere"], "no folder of a BERT model: it has no config.json"),
        (["--text-tower=bag", "--similarity=region-word-adaptive"], "one vector an item"),
        (["--size-augmentation=1"], "expected a probability below 1"),
        (["--recipe=best"], "recipe is 'best'; accepted: auto, features, official"),
    ],
)
def test_bad_input_is_one_line(argv, message, root, tmp_path, capsys):
    assert main(options(root, tmp_path, *argv)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
