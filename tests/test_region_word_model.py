"""The region-word head against golden files, its weights under the official names, and the models around it."""

import argparse
import copy
import json
import sys
import types

import pytest
import torch
from helpers import (
    AGGREGATORS,
    RESNET,
    VISION,
    clip_config,
    golden_files,
    gradient_errors,
    load_golden,
    relative_error,
    small_model,
)

import esl_fast
from esl_fast import RegionWordHead, load_checkpoint, save_checkpoint
from esl_fast.model import (
    REGION_WORD_SIMILARITIES,
    SIMILARITIES,
    CheckpointError,
    MatchingModel,
    ModelConfig,
    checkpoint,
    official,
    sequence_towers,
)
from esl_fast.reference.contribution import normed_matrix

GOLDEN = [pytest.param(path, id=path.stem) for path in golden_files("region_word_*.safetensors")]
either = pytest.mark.parametrize("aggregator", AGGREGATORS)


def random_head(aggregator="heuristic", embed_dim=32, kernel_size=2, num_levels=3):
    head = RegionWordHead(embed_dim, kernel_size, num_levels, aggregator).eval()
    with torch.no_grad():
        head.contribution.w.uniform_(0.05, 0.5)
        for parameter in (*head.contribution.weights, *head.contribution.biases):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head


def unit(*shape, dtype=torch.float32):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


@either
def test_a_region_of_zeros_scores_as_defined(aggregator):
    head = RegionWordHead(512, 2, 8, aggregator).eval()
    regions, words, lengths = unit(2, 4, 512), unit(3, 5, 512), torch.tensor([5, 2, 3])
    regions[1, 2:] = 0
    with torch.no_grad():
        scores = head(regions, words, lengths)
        expected = copy.deepcopy(head).double().train()(regions.double(), words.double(), lengths)
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-5)


@either
def test_a_region_of_zeros_has_no_gradient(aggregator):
    head, regions, words = RegionWordHead(256, aggregator=aggregator), unit(2, 5, 256), unit(2, 4, 256)
    regions[0, 3:] = 0
    leaves = [regions.requires_grad_(), *head.parameters()]
    scores = head(regions, words, torch.tensor([4, 2]))
    for gradient in torch.autograd.grad(scores.sum(), leaves, allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


@either
def test_transforms_see_through(aggregator):
    head = random_head(aggregator, num_levels=2).double()
    regions, words = unit(2, 3, 32, dtype=torch.float64), unit(2, 4, 32, dtype=torch.float64)
    direction = torch.randn_like(regions)

    def scores(x):
        return head(x, words, torch.tensor([2, 4]), torch.tensor([3, 1]))

    _, slope = torch.func.jvp(scores, (regions,), (direction,))
    difference = (scores(regions + 1e-6 * direction) - scores(regions - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-6)
    leaf = regions.clone().requires_grad_()
    (expected,) = torch.autograd.grad(scores(leaf).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: scores(x).sum())(regions), expected)


def test_a_table_of_one_entry_has_no_gradient():
    table, weight, bias = (torch.randn(1, 1, requires_grad=True) for _ in range(3))
    matrix = normed_matrix(table, weight, bias)
    assert torch.equal(matrix, bias)
    gradients = torch.autograd.grad(3 * matrix.sum(), (table, weight, bias))
    assert [gradient.item() for gradient in gradients] == [0, 0, 3]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("path", GOLDEN)
def test_golden_values(path, grad):
    parameters, golden = load_golden(path)
    head = RegionWordHead.from_official(parameters).eval()
    regions, words, lengths = (golden[name] for name in ("image_features", "text_features", "text_lengths"))
    with torch.set_grad_enabled(grad):
        scores = head(regions, words, lengths)
        assert relative_error(head.image_units(regions), golden["image_units"]) <= 1e-5
    assert scores.requires_grad == grad
    assert relative_error(scores, golden["similarity"]) <= 1e-5


@pytest.mark.parametrize("path", [p for p in GOLDEN if "train" in p.id])
def test_golden_gradients(path):
    parameters, golden = load_golden(path)
    head = RegionWordHead.from_official(parameters)
    inputs = {name: golden[name].requires_grad_() for name in ("image_features", "text_features")}
    (head(*inputs.values(), golden["text_lengths"]) * golden["grad_output"]).sum().backward()
    own = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in head.named_parameters()}
    actual = official.write_head(own, head.aggregator, official.REGION_WORD)
    actual |= {name: value.grad for name, value in inputs.items()}
    expected = {key.removeprefix("grad."): value for key, value in golden.items() if key.startswith("grad.")}
    errors = gradient_errors(actual, expected)
    assert max(errors.values()) <= 3e-4, max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize("path", GOLDEN)
def test_official_names(path):
    parameters, _ = load_golden(path)
    head = RegionWordHead.from_official({f"module.{key}": value for key, value in parameters.items()})
    written = head.to_official()
    assert written.keys() == parameters.keys()
    assert all(torch.equal(written[key], value) for key, value in parameters.items())


@either
def test_official_weights_there_and_back(aggregator):
    head = random_head(aggregator, 50, 3, 2).double()
    weights = head.to_official()
    whole = {"epoch": 3, "model": [{"fc.weight": torch.zeros(1)}, {}, weights], "best_rsum": 1.0}
    for given in (weights, whole):
        again = RegionWordHead.from_official(given)
        assert (again.aggregator, again.dims, again.num_levels) == (aggregator, head.dims, 2)
        assert all(torch.equal(again.state_dict()[key], value) for key, value in head.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16], ids=str)
def test_lengths_of_any_integer_dtype(dtype):
    head = RegionWordHead(16, 2, 2)
    regions, words = (torch.nn.functional.normalize(torch.randn(3, k, 16), dim=-1) for k in (6, 7))
    lengths = torch.tensor([7, 2, 4]), torch.tensor([6, 1, 3])
    expected, found = ([head.operands(regions, words, *(x.to(t) for x in lengths))] for t in (torch.int64, dtype))
    for results in (expected, found):
        (units,) = results
        results += [esl_fast.region_word_similarity(**units), *esl_fast.region_word_topk(**units, k=2)]
        results += esl_fast.region_word_ranks(**units, owners=torch.arange(3))
        results += [esl_fast.region_word_hinge_loss(**units, hardest=hardest) for hardest in (False, True)]
    assert all(map(torch.equal, expected[1:], found[1:]))


@pytest.mark.parametrize(("n", "m"), [(2, 9), (9, 2)])
def test_compiled_too_folds_the_smaller_side(n, m):
    head = RegionWordHead(16, 2, 2)
    inputs = torch.randn(n, 6, 16), torch.randn(m, 6, 16), torch.full((m,), 6)
    compiled = torch.compile(head.operands, fullgraph=True, backend="eager")
    found, expected = compiled(*inputs), head.operands(*inputs)
    for side in ("region_units", "word_units"):
        torch.testing.assert_close(found[side], expected[side])


def test_exported_for_all_batch_sizes():
    def inputs(n, m):
        regions, words = torch.randn(n, 6, 16), torch.randn(m, 7, 16)
        return regions, words, torch.randint(1, 8, (m,))

    head = RegionWordHead(16, 2, 2)
    images, captions = {0: torch.export.Dim("images")}, {0: torch.export.Dim("captions")}
    exported = torch.export.export(head, inputs(3, 5), dynamic_shapes=(images, captions, captions))
    for n, m in ((3, 5), (8, 2)):
        given = inputs(n, m)
        torch.testing.assert_close(exported.module()(*given), head(*given))


@either
def test_every_parameter_has_a_gradient(aggregator):
    """As distributed training wants it, also where nothing depends on one."""
    head = RegionWordHead(16, 2, 2, aggregator)
    regions, words = (torch.nn.functional.normalize(torch.randn(3, k, 16), dim=-1) for k in (6, 7))
    head(regions, words, torch.tensor([7, 2, 4])).sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_operands_are_what_the_functions_take():
    head = random_head()
    given = (unit(4, 5, 32), unit(4, 6, 32), torch.tensor([1, 6, 3, 2]), torch.tensor([5, 1, 2, 3]))
    scores, units = head(*given), head.operands(*given)
    torch.testing.assert_close(esl_fast.region_word_similarity(**units), scores)
    best, which = esl_fast.region_word_topk(**units, k=3)
    torch.testing.assert_close(best, scores.sort(1, descending=True).values[:, :3])
    again, same = esl_fast.region_word_rerank(**units, candidates=which.flip(1))
    torch.testing.assert_close(again, best)
    assert torch.equal(same, which)
    ranks = esl_fast.region_word_ranks(**units, owners=torch.arange(4))
    expected = esl_fast.retrieval_ranks(scores.detach(), torch.eye(4), torch.arange(4))
    assert all(map(torch.equal, ranks, expected))
    for hardest in (False, True):
        loss = esl_fast.region_word_hinge_loss(**units, hardest=hardest)
        torch.testing.assert_close(loss, esl_fast.hinge_loss(scores, hardest=hardest))


def test_initial_parameters():
    head = RegionWordHead(64, num_levels=4)
    assert head.degrees().tolist() == pytest.approx([0.1] * 5)
    contribution = head.contribution
    assert (contribution.temp_scale_1.item(), contribution.temp_scale_2.item()) == (0, 3)
    assert contribution.temp_scale.exp().item() == pytest.approx(1 / 0.07)


@either
def test_padding_changes_nothing(aggregator):
    head = random_head(aggregator)
    regions, words = unit(4, 6, 32), unit(5, 7, 32)
    region_lengths, word_lengths = torch.tensor([6, 1, 3, 5]), torch.tensor([2, 7, 1, 4, 3])
    expected = torch.stack([
        torch.cat([
            head(region[None, :r], word[None, :w], torch.tensor([w]))[0]
            for word, w in zip(words, word_lengths.tolist(), strict=True)
        ])
        for region, r in zip(regions, region_lengths.tolist(), strict=True)
    ])  # fmt: skip
    for filling in (0.0, 100.0, torch.nan):
        regions[torch.arange(6) >= region_lengths[:, None]] = filling
        words[torch.arange(7) >= word_lengths[:, None]] = filling
        given = [regions.clone().requires_grad_(), words.clone().requires_grad_()]
        scores = head(*given, word_lengths, region_lengths)
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
        scores.sum().backward()
        assert not given[0].grad[torch.arange(6) >= region_lengths[:, None]].any()
        assert not given[1].grad[torch.arange(7) >= word_lengths[:, None]].any()
        assert all(g.grad.isfinite().all() for g in given)


@either
@pytest.mark.parametrize("counts", [(2, 9), (9, 2)])
def test_folding_either_side_is_the_same(aggregator, counts):
    head = random_head(aggregator).double()
    regions, words = unit(counts[0], 3, 32, dtype=torch.float64), unit(counts[1], 3, 32, dtype=torch.float64)
    lengths = torch.full((counts[1],), 3)
    rows = [head(regions[i : i + 1], words, lengths) for i in range(counts[0])]
    torch.testing.assert_close(head(regions, words, lengths), torch.cat(rows))


BAD = {
    "empty caption": ({"word_lengths": torch.tensor([2, 0])}, ValueError, "caption 1 has no words"),
    "empty image": ({"region_lengths": torch.tensor([1, 0, 2])}, ValueError, "image 1 has no regions"),
    "too long": ({"word_lengths": torch.tensor([2, 6])}, ValueError, r"expected 1\.\.5"),
    "wrong width": ({"regions": torch.zeros(3, 4, 31)}, ValueError, r"regions has shape \(3, 4, 31\)"),
    "no sequence": ({"words": torch.zeros(2, 32)}, ValueError, r"words has shape \(2, 32\)"),
    "integers": ({"words": torch.zeros(2, 5, 32, dtype=torch.long)}, TypeError, "words has dtype torch.int64"),
    "device": ({"words": torch.zeros(2, 5, 32, device="meta")}, ValueError, "different devices"),
    "not finite": ({"regions": torch.full((3, 4, 32), torch.nan)}, ValueError, "regions has non-finite .* 3 of 3 rows"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, error, message):
    good = {"regions": unit(3, 4, 32), "words": unit(2, 5, 32), "word_lengths": torch.tensor([5, 2])}
    with pytest.raises(error, match=message):
        random_head()(**(good | change))


def test_broken_official_weights():
    weights = random_head().to_official()
    with pytest.raises(ValueError, match=r"lynorm_2\.bias"):
        RegionWordHead.from_official({key: value for key, value in weights.items() if "lynorm_2.bias" not in key})
    with pytest.raises(ValueError, match="not an ESL head of this variant"):
        RegionWordHead.from_official({"fc.weight": torch.zeros(2, 2)})


# Models


def region_model(similarity="region-word-heuristic", **changes):
    sizes = {"image_tower": "regions", "text_tower": "words", "feature_dim": 6, "bag_size": 12, "embed_dim": 16}
    model = MatchingModel(ModelConfig(**({"similarity": similarity, "num_levels": 3} | sizes | changes)))
    if model.config.text_tower == "words":
        model.text_tower.entry_of[1000:1010] = torch.arange(2, 12)
    return model.eval()


def captions(*words):
    tokens = torch.zeros(len(words), 9, dtype=torch.int64)
    for row, ids in zip(tokens, words, strict=True):
        row[: len(ids) + 2] = torch.tensor([49406, *ids, 49407])
    return tokens


@pytest.mark.parametrize("similarity", REGION_WORD_SIMILARITIES)
def test_regions_and_words(similarity, tmp_path):
    model = region_model(similarity)
    regions, tokens = torch.randn(3, 4, 6), captions([1000, 1001], [1002, 1003, 1004], [5])
    words = model.encode_text(tokens)
    assert words.lengths.tolist() == [2, 3, 1]
    assert words.vectors.shape == (3, 3, 16)
    norms = words.vectors.norm(dim=-1)
    torch.testing.assert_close(norms, (torch.arange(3) < words.lengths[:, None]).float())
    image = model.encode_image(regions)
    scores = model(regions, tokens)
    torch.testing.assert_close(scores, model.head(image.vectors, words.vectors, words.lengths))
    save_checkpoint(model, tmp_path / "model")
    torch.testing.assert_close(load_checkpoint(tmp_path / "model")(regions, tokens), scores)


def test_regions_that_are_left_out_change_nothing():
    model, regions, tokens = region_model(), torch.randn(3, 4, 6), captions([1000], [1001, 1002])
    lengths = torch.tensor([4, 1, 2])
    for mode in (False, True):  # in training the statistics of the batch are over real regions
        model.train(mode)
        garbage = regions.masked_fill((torch.arange(4) >= lengths[:, None]).unsqueeze(-1), 100.0)
        one, other = (model.encode_image(x, lengths) for x in (regions, garbage))
        torch.testing.assert_close(model.head.scores(one, model.encode_text(tokens)).matrix(),
                                   model.head.scores(other, model.encode_text(tokens)).matrix())  # fmt: skip
    alone = model.eval().encode_image(regions[2:3, :2])
    torch.testing.assert_close(model.encode_image(regions, lengths).vectors[2, :2], alone.vectors[0])


def test_unknown_words_and_empty_captions():
    tower = region_model().text_tower
    words = tower(captions([7, 1000], [], [8]))
    assert words.lengths.tolist() == [2, 1, 1]
    entry = tower.embedding.weight
    torch.testing.assert_close(words.vectors[:, 0], entry[[1, 1, 1]])
    torch.testing.assert_close(words.vectors[0, 1], entry[2])


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_global_heads_take_the_mean(similarity):
    model, regions, tokens = region_model(similarity), torch.randn(3, 4, 6), captions([1000, 1001], [1002])
    torch.testing.assert_close(model.encode_image(regions), model.image_tower(regions).vectors.mean(1))
    entry = model.text_tower.embedding.weight
    torch.testing.assert_close(model.encode_text(tokens), torch.stack([(entry[2] + entry[3]) / 2, entry[4]]))
    assert model(regions, tokens).shape == (3, 2)


@pytest.mark.parametrize("vision", [VISION, RESNET], ids=["vit", "resnet"])
def test_patches_and_tokens_of_open_clip(vision):
    model = small_model(similarity="region-word-heuristic", clip=clip_config(vision_cfg=vision))
    plain = small_model(clip=clip_config(vision_cfg=vision))
    plain.image_tower.load_state_dict(model.image_tower.tower.state_dict())
    plain.text_tower.load_state_dict(model.text_tower.tower.state_dict())
    images, tokens = torch.randn(2, 3, 32, 32), model.tokenize(["a dog", "two birds on a wire"])
    patches, words = model.encode_image(images), model.encode_text(tokens)
    assert patches.vectors.shape == (2, 4 if vision is VISION else 1, 32)
    assert words.lengths.tolist() == [4, 7]
    # The token at the end of a text is what the pooled embedding is made of.
    pooled = torch.nn.functional.normalize(plain.encode_text(tokens), dim=-1)
    ends = words.vectors[torch.arange(2), words.lengths - 1]
    torch.testing.assert_close(ends, pooled)
    model(images, tokens).sum().backward()
    assert all(p.grad is not None for p in model.text_tower.parameters())
    model.freeze(image_layers=1, text_layers=1)
    assert not model.text_tower.tower.token_embedding.weight.requires_grad


def test_end_of_text_that_is_not_the_highest_id():
    def tower(**options):
        text = clip_config()["text_cfg"] | options
        return small_model(similarity="region-word-heuristic", clip=clip_config(text_cfg=text)).text_tower

    tokens = torch.tensor([[0, 900, 30, 2, 1, 1], [0, 7, 2, 1, 1, 1]])
    assert tower(pool_type="eos", eos_id=2)(tokens).lengths.tolist() == [4, 3]
    with pytest.raises(ValueError, match="pool_type 'last'"):
        tower(pool_type="last")


@pytest.mark.parametrize("text_tower", ["words", "bag"])
def test_known_tokens_are_clips_beside_another_tokenizer(text_tower):
    text = clip_config()["text_cfg"] | {"hf_tokenizer_name": "nobody/nothing"}
    model = small_model(text_tower=text_tower, bag_size=5, clip=clip_config(text_cfg=text))
    assert model.tokenize(["dog"])[0, 0] == model.special_tokens.start


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_tower": "bag"}, "text_tower is 'bag', one vector an item; region-word-heuristic takes 'open_clip'"),
        ({"image_tower": "features"}, "image_tower is 'features', one vector"),
        ({"text_tower": "bert"}, "bert is missing"),
        ({"feature_dim": None}, "feature_dim is missing"),
    ],
)
def test_configurations_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        region_model(**changes)


# BERT and official checkpoints


class FakeBert(torch.nn.Module):
    """Parameters under the names of transformers' BertModel, and hidden states that depend on the token."""

    def __init__(self, config, add_pooling_layer=True):
        super().__init__()
        assert not add_pooling_layer
        self.config = config
        width, module = config.hidden_size, torch.nn.Module
        self.embeddings, self.encoder = module(), module()
        for name, size in (("word", "vocab_size"), ("position", "max_position_embeddings"),
                           ("token_type", "type_vocab_size")):  # fmt: skip
            setattr(self.embeddings, f"{name}_embeddings", torch.nn.Embedding(getattr(config, size), width))
        self.encoder.layer = torch.nn.ModuleList(module() for _ in range(config.num_hidden_layers))
        for layer in self.encoder.layer:
            layer.intermediate = module()
            layer.intermediate.dense = torch.nn.Linear(width, config.intermediate_size)

    def forward(self, input_ids, attention_mask):
        assert torch.equal(attention_mask, (input_ids != 0).long())
        return types.SimpleNamespace(last_hidden_state=self.embeddings.word_embeddings(input_ids))


@pytest.fixture
def fake_transformers(monkeypatch):
    def config(**sizes):
        return types.SimpleNamespace(**sizes)

    module = types.SimpleNamespace(BertModel=FakeBert, BertConfig=config)
    monkeypatch.setattr(sequence_towers, "transformers", lambda: module)


SIZES = {"vocab_size": 200, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 1,
         "intermediate_size": 40, "max_position_embeddings": 20, "type_vocab_size": 2}  # fmt: skip


def official_parts(model, prefix):
    """A model's three state dicts as the official code names them."""
    own = model.image_tower.state_dict()
    image = {"mlp.bns.1.weight": torch.ones(16)}
    for ours, theirs in {"linear": "fc", "inner": "mlp.layers.0", "norm": "mlp.bns.0", "outer": "mlp.layers.1"}.items():
        image |= {key.replace(ours, theirs): value for key, value in own.items() if key.startswith(f"{ours}.")}
    text = dict(model.text_tower.state_dict()) | {
        "bert.pooler.dense.weight": torch.zeros(24, 24),
        "bert.embeddings.position_ids": torch.arange(20)[None],
    }
    return [{prefix + key: value for key, value in part.items()} for part in (image, text, model.head.to_official())]


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("similarity", REGION_WORD_SIMILARITIES)
def test_official_checkpoint(similarity, prefix, tmp_path, fake_transformers):
    model = region_model(similarity, text_tower="bert", bert={"config": SIZES, "vocabulary": None})
    model.image_tower.norm.running_mean.normal_()
    options = argparse.Namespace(margin=0.2, data_path="/home/someone")
    contents = {"epoch": 3, "model": official_parts(model, prefix), "best_rsum": 500.0, "opt": options, "Eiters": 7}
    torch.save(contents, tmp_path / "model_best.pth")
    again = load_checkpoint(tmp_path / "model_best.pth")
    assert again.config.bert["config"] == SIZES
    assert again.special_tokens == (101, 102, 103)
    regions, tokens = torch.randn(3, 4, 6), torch.tensor([[101, 7, 102, 0], [101, 8, 9, 102]])
    with torch.no_grad():
        torch.testing.assert_close(again(regions, tokens), model(regions, tokens), rtol=0, atol=0)
    assert again.encode_text(tokens).lengths.tolist() == [3, 4]


@pytest.fixture
def official_file(tmp_path, monkeypatch, fake_transformers):
    model = region_model(text_tower="bert", bert={"config": SIZES, "vocabulary": None})
    parts = official_parts(model, "module.")
    torch.save({"epoch": 3, "model": parts, "opt": argparse.Namespace()}, tmp_path / "model_best.pth")
    return tmp_path / "model_best.pth", parts, model


def test_without_transformers_the_head_still_loads(official_file, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "transformers", None)
    path, _, model = official_file
    with pytest.raises(CheckpointError, match=r"model_best\.pth: .*pip install 'esl_fast\[bert\]'"):
        load_checkpoint(path)
    head = RegionWordHead.from_official(checkpoint.read_pth(path))
    assert all(torch.equal(head.state_dict()[key], value) for key, value in model.head.state_dict().items())


@pytest.mark.parametrize(("part", "missing"), [(0, "fc.weight"), (1, "linear.weight"), (2, "calculator_1.sim_eval")])
def test_incomplete_official_checkpoints(official_file, part, missing):
    path, parts, _ = official_file
    parts[part] = {key: value for key, value in parts[part].items() if missing not in key}
    torch.save({"model": parts}, path)
    with pytest.raises(CheckpointError, match=missing):
        load_checkpoint(path)


def test_bert_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        sequence_towers.read_bert_folder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 24, "architectures": ["x"]}))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\ndog\n")
    bert, has_weights = sequence_towers.read_bert_folder(str(tmp_path))
    assert (bert["config"], has_weights) == ({"hidden_size": 24}, False)
    assert sequence_towers.bert_special_tokens(bert) == (2, 3, 4)
    official = {"config": {"vocab_size": 7}, "vocabulary": None}
    sequence_towers.give_vocabulary(official, str(tmp_path))
    assert official["vocabulary"] == bert["vocabulary"]
    for other in ({"config": {"vocab_size": 6}, "vocabulary": None}, bert | {"vocabulary": bert["vocabulary"][::-1]}):
        with pytest.raises(ValueError, match="whose vocabulary of 7 is not that of the checkpoint"):
            sequence_towers.give_vocabulary(other, str(tmp_path))
    with pytest.raises(ValueError, match=r"BERT's vocabulary lacks \[MASK\]"):
        sequence_towers.bert_special_tokens({"vocabulary": ["[CLS]", "[SEP]", "a"]})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no BERT's configuration"):
        sequence_towers.read_bert_folder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"vocab_size": 3}))
    with pytest.raises(ValueError, match=r"vocab\.txt has 7 entries, vocab_size is 3"):
        sequence_towers.read_bert_folder(str(tmp_path))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[CLS]\n[SEP]\n")
    with pytest.raises(ValueError, match=r"expected \[PAD\] first, and \[UNK\]"):
        sequence_towers.read_bert_folder(str(tmp_path))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="model_type is 'gpt2'"):
        sequence_towers.read_bert_folder(str(tmp_path))


def test_half_a_bert(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": "bert"}))
    (tmp_path / "model.safetensors").write_bytes(b"half a download")
    with pytest.raises(ValueError, match=f"no BERT can be made of {tmp_path}"):
        sequence_towers.BertTokens({}, 4, str(tmp_path))
    with pytest.raises(ValueError, match=r"no BERT can be made of .*zzz"):
        sequence_towers.BertTokens(SIZES | {"hidden_act": "zzz"}, 4)


def test_real_bert(tmp_path):
    pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "runs"]
    bert = {"config": SIZES | {"vocab_size": len(words)}, "vocabulary": words}
    model = region_model(text_tower="bert", bert=bert)
    tokens = model.tokenize(["A dog", "a dog runs runs"])
    assert tokens[0, :5].tolist() == [2, 5, 6, 3, 0]
    assert model.encode_text(tokens).lengths.tolist() == [4, 6]
    assert model(torch.randn(3, 4, 6), tokens).shape == (3, 2)
    model.freeze(text_layers=1)
    trained = {name for name, p in model.text_tower.named_parameters() if p.requires_grad}
    assert not any("embeddings" in name or "layer.0" in name for name in trained)
    assert any("layer.1" in name for name in trained)


def test_gradients_are_no_constants_to_a_second_one():
    head, words = RegionWordHead(8, 2, 2), torch.rand(2, 4, 8)
    regions = torch.rand(3, 5, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(head(regions, words, torch.tensor([2, 4])).sum(), [regions], create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        gradient.square().sum().backward()


def test_one_region_is_no_batch():
    tower = region_model().image_tower.train()
    tower(torch.randn(2, 1, 6))
    with pytest.raises(ValueError, match="batch norm takes two regions or more"):
        tower(torch.randn(1, 3, 6), torch.tensor([1]))
    tower.eval()(torch.randn(1, 1, 6))
