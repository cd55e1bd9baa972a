"""The ESL head against golden files, the definition in float64, and everything a caller may hand it."""

import contextlib
import copy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import (
    AGGREGATORS,
    Definition,
    golden_files,
    gradient_errors,
    info_nce,
    load_golden,
    random_head,
    relative_error,
)
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils import prune

from esl_fast import ESLHead, RegionWordHead, blocked, ops, reference, similarity
from esl_fast.model import SIMILARITIES, CosineHead, Head, make_head, official

GOLDEN = [pytest.param(path, id=path.stem) for path in golden_files("clip_*.safetensors")]
GOLDEN_TRAIN = [pytest.param(path, id=path.stem) for path in golden_files("clip_*_train.safetensors")]
either = pytest.mark.parametrize("aggregator", AGGREGATORS)
# With gradients the readable form runs, without them the blocked one.
either_path = pytest.mark.parametrize("grad", [False, True], ids=["blocked", "autograd"])


def exact(head: ESLHead) -> Definition:
    return Definition({key: value.double() for key, value in head.to_official().items()})


@pytest.mark.parametrize("path", GOLDEN)
@either_path
def test_golden_values(path, grad):
    parameters, golden = load_golden(path)
    head = ESLHead.from_official(parameters).eval()
    images, texts = golden["image_features"], golden["text_features"]
    with torch.set_grad_enabled(grad):
        computed = {
            "image_units": head.image_units(images),
            "text_units": head.text_units(texts),
            "similarity": head(images, texts),
        }
    definition = exact(head)
    defined = {
        "image_units": torch.cat(definition.units(images.double(), "image"), -1),
        "text_units": torch.cat(definition.units(texts.double(), "text"), -1),
        "similarity": definition.similarity(images.double(), texts.double()),
    }
    for name, value in computed.items():
        assert value.requires_grad == grad
        assert relative_error(value, golden[name]) <= 1e-5, name
        assert relative_error(value, defined[name]) <= 1e-6, name


def loss_and_gradients(head: ESLHead, images, texts, logit_scale):
    """InfoNCE loss and its gradients under the names that golden files use."""
    inputs = {"image_features": images, "text_features": texts, "logit_scale": logit_scale}
    for value in inputs.values():
        value.requires_grad_()
    loss = info_nce(head(images, texts), logit_scale)
    loss.backward()
    own = {name: parameter.grad for name, parameter in head.named_parameters()}
    own["contribution.temp_scale"] = torch.zeros(())  # a buffer
    return loss, official.write_head(own, head.aggregator) | {name: value.grad for name, value in inputs.items()}


def defined_gradients(head: ESLHead, images, texts, logit_scale):
    """The same from the definition, in float64."""
    parameters = {key: value.double().requires_grad_() for key, value in head.to_official().items()}
    inputs = {"image_features": images, "text_features": texts, "logit_scale": logit_scale}
    inputs = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    similarity = Definition(parameters).similarity(inputs["image_features"], inputs["text_features"])
    loss = info_nce(similarity, inputs["logit_scale"])
    leaves = inputs | {key: value for key, value in parameters.items() if "temp_scale.weight" not in key}
    return loss, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("path", GOLDEN_TRAIN)
def test_golden_gradients(path):
    parameters, golden = load_golden(path)
    expected = {key.removeprefix("grad."): value for key, value in golden.items() if key.startswith("grad.")}
    inputs = [golden[name] for name in ("image_features", "text_features", "logit_scale")]
    loss, gradients = loss_and_gradients(ESLHead.from_official(parameters), *inputs)
    assert relative_error(loss, golden["loss"].squeeze()) <= 1e-6
    errors = gradient_errors(gradients, expected)
    assert len(errors) == len(list(ESLHead.from_official(parameters).to_official())) - 1 + 3  # all but `temp_scale`
    assert max(errors.values()) <= 3e-4, errors


@pytest.mark.parametrize("path", GOLDEN_TRAIN)
def test_golden_gradients_float64(path):
    parameters, golden = load_golden(path)
    head = ESLHead.from_official(parameters).double()
    inputs = [golden[name].double() for name in ("image_features", "text_features", "logit_scale")]
    loss, gradients = loss_and_gradients(head, *inputs)
    defined, expected = defined_gradients(head, *inputs)
    assert relative_error(loss, defined) <= 1e-12
    errors = gradient_errors(gradients, expected)
    assert max(errors.values()) <= 1e-6, errors


SIZES = [
    (512, 2, 8), (640, 2, 8), (768, 2, 8), (1024, 2, 8), (1152, 2, 8), (300, 2, 8), (257, 2, 7), (301, 3, 5),
    (100, 7, 2), (6, 1, 3), (5, 2, 0), (1, 2, 0),
]  # fmt: skip


@pytest.mark.parametrize(("embed_dim", "kernel_size", "num_levels"), SIZES)
@either
@either_path
def test_every_size(aggregator, embed_dim, kernel_size, num_levels, grad):
    head = random_head(aggregator, embed_dim, kernel_size, num_levels)
    images, texts = torch.randn(5, embed_dim), torch.randn(9, embed_dim)
    with torch.set_grad_enabled(grad):
        similarity = head(images, texts)
    assert relative_error(similarity, exact(head).similarity(images.double(), texts.double())) <= 1e-6


@pytest.mark.parametrize(("embed_dim", "kernel_size", "num_levels"), [(37, 2, 4), (81, 3, 3), (9, 4, 1)])
@either
def test_gradients_of_every_size(aggregator, embed_dim, kernel_size, num_levels):
    head = random_head(aggregator, embed_dim, kernel_size, num_levels).double()
    inputs = torch.randn(6, embed_dim).double(), torch.randn(6, embed_dim).double(), torch.ones(1).double()
    _, expected = defined_gradients(head, *inputs)
    errors = gradient_errors(loss_and_gradients(head, *inputs)[1], expected)
    assert max(errors.values()) <= 1e-6, errors


@pytest.mark.parametrize("count", [(0, 3), (3, 0), (0, 0), (1, 1), (2, 7), (7, 2)])
@either
@either_path
def test_any_number_of_items(aggregator, count, grad):
    head = random_head(aggregator)
    images, texts = torch.randn(count[0], 64), torch.randn(count[1], 64)
    with torch.set_grad_enabled(grad):
        similarity = head(images, texts)
    assert similarity.shape == count
    torch.testing.assert_close(similarity, exact(head).similarity(images.double(), texts.double()).float())


@either
def test_empty_batch_has_gradients(aggregator):
    head = random_head(aggregator)
    head(torch.zeros(0, 64), torch.randn(3, 64)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=str
)
@either
@either_path
def test_dtypes(aggregator, dtype, tolerance, grad):
    head = random_head(aggregator)
    images, texts = torch.randn(5, 64).to(dtype), torch.randn(9, 64).to(dtype)
    with torch.set_grad_enabled(grad):
        similarity = head(images, texts)
        mixed = head(images, texts.float())
    expected = exact(head).similarity(images.double(), texts.double())
    assert similarity.dtype == dtype
    assert mixed.dtype == torch.promote_types(dtype, torch.float32)
    assert relative_error(similarity, expected) <= tolerance
    assert relative_error(mixed, expected) <= tolerance


@either
@either_path
def test_features_need_not_be_contiguous(aggregator, grad):
    head = random_head(aggregator)
    images, texts = torch.randn(64, 5).T, torch.randn(18, 128)[::2, ::2]
    with torch.set_grad_enabled(grad):
        strided = head(images, texts)
        torch.testing.assert_close(strided, head(images.contiguous(), texts.contiguous()))
        torch.testing.assert_close(head(images[:1].expand(4, -1), texts), strided[:1].expand(4, -1))


@either
@either_path
def test_folding_either_side_is_the_same(aggregator, grad):
    head = random_head(aggregator)
    with torch.set_grad_enabled(grad):
        images, texts = head.image_units(torch.randn(4, 64)), head.text_units(torch.randn(6, 64))
        torch.testing.assert_close(head.fold(images, "image") @ texts.T, images @ head.fold(texts, "text").T)


class OwnHead(Head):
    """What someone else may derive: units and folding, nothing more."""

    embed_dim = 64

    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.randn(64, 64))

    def image_units(self, x):
        return x.sin()

    def text_units(self, y):
        return y.cos()

    def fold(self, units, side):
        return units @ (self.matrix if side == "image" else self.matrix.mT)


HEADS = {
    "heuristic": lambda: random_head("heuristic"),
    "adaptive": lambda: random_head("adaptive"),
    "narrowed": lambda: random_head("adaptive").narrowed(0.05),
    "cosine": lambda: CosineHead(64),
    "own": OwnHead,
}
# With more than one block, and a last one that is not full.
STREAMED = [(5, 83), (83, 5), (50, 50), (0, 40), (40, 0), (16, 17)]


@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("count", STREAMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_streaming_changes_nothing(monkeypatch, make, count, dtype):
    monkeypatch.setattr(blocked.similarity, "BLOCK", 16)
    head = make().to(dtype)
    images, texts = torch.randn(count[0], 64).to(dtype), torch.randn(count[1], 64).to(dtype)
    whole = head.scores(images, texts).matrix().detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            streamed = head(images, texts)
            assert streamed.dtype == dtype
            assert streamed.is_contiguous()
            torch.testing.assert_close(streamed, whole, atol=1e-5, rtol=2 ** -6 if dtype == torch.bfloat16 else 1e-5)


@either
def test_streaming_names_rows_of_the_whole(monkeypatch, aggregator):
    monkeypatch.setattr(blocked.similarity, "BLOCK", 16)
    head, few, many = random_head(aggregator), torch.randn(5, 64), torch.randn(83, 64)
    many[[3, 70], [0, 63]] = torch.inf
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"text_features .* 2 of 83 rows: 3, 70$"):
            head(few, many)
        with pytest.raises(ValueError, match=r"image_features .* 2 of 83 rows: 3, 70$"):
            head(many, few)


@either
def test_threads_and_calls_do_not_share_results(monkeypatch, aggregator):
    monkeypatch.setattr(blocked.similarity, "BLOCK", 16)
    head, images, texts = random_head(aggregator), torch.randn(12, 10, 64), torch.randn(12, 83, 64)
    with torch.no_grad():
        expected = [(head(x, y), head.image_units(x), head.text_units(y)) for x, y in zip(images, texts, strict=True)]

    @torch.no_grad()
    def score(i):
        x, y = images[i % 12], texts[i % 12]
        return head(x, y), head.image_units(x), head.text_units(y)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(score, range(120)))
    for i, results in enumerate(found):
        for result, right in zip(results, expected[i % 12], strict=True):
            assert torch.equal(result, right)


@pytest.mark.parametrize("training", [False, True])
def test_streaming_selects_once(monkeypatch, training):
    monkeypatch.setattr(blocked.similarity, "BLOCK", 16)
    head = random_head("adaptive").train(training)
    calls, select = [], reference.aggregate.select_top2
    monkeypatch.setattr(reference.aggregate, "select_top2", lambda w: calls.append(1) or select(w))
    with torch.no_grad():
        head(torch.randn(3, 64), torch.randn(83, 64))
    assert len(calls) == 2 * head.num_levels


@either
def test_units_of_any_leading_sizes(aggregator):
    head = random_head(aggregator)
    x = torch.randn(2, 3, 64)
    for units in (head.image_units, head.text_units):
        torch.testing.assert_close(units(x).flatten(0, 1), units(x.flatten(0, 1)))
        torch.testing.assert_close(units(x[0, 0]), units(x)[0, 0])
        assert units(x[:, :0]).shape == (2, 0, sum(head.dims))


def test_initial_parameters():
    head = ESLHead(512)
    assert head.dims == [512, 256, 128, 64, 32, 16, 8, 4, 2]
    assert head.degrees().tolist() == pytest.approx([0.1] * 9)
    contribution = head.contribution
    assert (contribution.temp_scale_1.item(), contribution.temp_scale_2.item()) == (-1, 4)
    assert all(torch.equal(matrix, torch.eye(d)) for matrix, d in zip(contribution.matrices, head.dims, strict=True))
    adaptive = torch.cat([weight.flatten() for weight in ESLHead(512, aggregator="adaptive").image.weights])
    assert abs(adaptive.mean()) < 0.02
    assert adaptive.std().item() == pytest.approx(1, abs=0.02)


# Official weights


@pytest.mark.parametrize("prefix", ["pool_frames.", "", "module.pool_frames.", "module."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@either
def test_official_weights_there_and_back(aggregator, dtype, prefix):
    head = random_head(aggregator, 50, 3, 2).to(dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-3)  # in all digits of its dtype
    weights = head.to_official()
    given = {prefix + key.removeprefix("pool_frames."): value for key, value in weights.items()}
    again = ESLHead.from_official(given | {"clip.logit_scale": torch.zeros(())})
    assert (again.aggregator, again.dims, again.num_levels) == (aggregator, head.dims, 2)
    for restored in (again.state_dict(), ESLHead.from_official(again.to_official()).state_dict()):
        assert restored.keys() == head.state_dict().keys()
        assert all(torch.equal(restored[key], value) for key, value in head.state_dict().items())
    assert all(torch.equal(again.to_official()[key], value) for key, value in weights.items())


@pytest.mark.parametrize("path", GOLDEN)
def test_official_names(path):
    parameters, _ = load_golden(path)
    written = ESLHead.from_official(parameters).to_official()
    assert written.keys() == parameters.keys()
    assert all(torch.equal(written[key], value) for key, value in parameters.items())


def test_official_weights_are_copies():
    head = random_head("adaptive")
    weights = head.to_official()
    again = ESLHead.from_official(weights)
    for value in weights.values():
        value.zero_()
    torch.testing.assert_close(again.state_dict(), head.state_dict())


BROKEN = {
    "no head": (lambda w: w.clear(), "not an ESL head"),
    "no matrices": (lambda w: [w.pop(key) for key in list(w) if "calculator_1.masks_" in key], "masks_0.weight"),
    "one matrix": (lambda w: [w.pop(k) for k in list(w) if "calculator_1.masks_" in k and "_0." not in k], "masks_1"),
    "other sizes": (lambda w: w.update({k: v[1:, 1:] for k, v in w.items() if "1.masks_2." in k}), "kernel size|taps"),
    "scalars": (lambda w: w.update({k: v.sum() for k, v in w.items() if "1.masks_2." in k}), "masks_2"),
    "integers": (lambda w: w.update({k: v.int() for k, v in w.items() if "1.masks_2." in k}), "masks_2.*int32"),
    "no tensors": (lambda w: w.update({k: 1 for k in w if "1.masks_2." in k}), "no tensor .*masks_2"),
    "missing": (lambda w: w.pop(next(k for k in w if "text_levels" in k)), "text_levels"),
    "too few degrees": (lambda w: w.update({k: v[:, 1:] for k, v in w.items() if "sim_eval" in k}), "sim_eval"),
    "not square": (lambda w: w.update({k: v[:, 1:] for k, v in w.items() if "1.masks_1." in k}), "masks_1"),
    "misshapen": (lambda w: w.update({k: v[..., 1:] for k, v in w.items() if "text_levels" in k}), "text_levels"),
}


@pytest.mark.parametrize(("damage", "named"), BROKEN.values(), ids=BROKEN)
@either
def test_broken_official_weights(aggregator, damage, named):
    weights = random_head(aggregator).to_official()
    damage(weights)
    with pytest.raises(ValueError, match=named):
        ESLHead.from_official(weights)


@pytest.mark.parametrize("given", [None, [], torch.zeros(3)], ids=str)
def test_weights_are_a_state_dict(given):
    with pytest.raises(TypeError, match="a state dict; given a"):
        ESLHead.from_official(given)


@either
def test_official_weights_of_no_level(aggregator):
    head, x = ESLHead(16, num_levels=0, aggregator=aggregator), torch.randn(3, 16)
    again = ESLHead.from_official({"epoch": 3, "state_dict": head.to_official()})
    assert again.num_levels == 0
    torch.testing.assert_close(again(x, x), head(x, x))


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "embed_dim is 0"),
        ((-3,), "embed_dim is -3"),
        ((512.0,), "embed_dim is 512.0"),
        ((True,), "embed_dim is True"),
        ((512, 0), "kernel_size is 0"),
        ((512, 2, -1), "num_levels is -1"),
        ((256, 2, 9), "num_levels may be at most 8"),
        ((512, 3, 6), "num_levels may be at most 5"),
        ((512, 2, 8, "mean"), "'heuristic', 'adaptive'"),
    ],
)
def test_sizes_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        ESLHead(*arguments)


GOOD = torch.ones(3, 64)
BAD_FEATURES = {
    "integers": (torch.ones(3, 64, dtype=torch.int64), TypeError, "NAME has dtype torch.int64"),
    "array": (GOOD.numpy(), TypeError, "NAME is a ndarray"),
    "width": (torch.ones(3, 63), ValueError, r"NAME has shape \(3, 63\); expected \(n, 64\)"),
    "sparse": (torch.ones(3, 64).to_sparse(), TypeError, "NAME has layout torch.sparse_coo"),
    "vector": (torch.ones(64), ValueError, r"NAME has shape \(64,\)"),
    "device": (torch.ones(3, 64, device="meta"), ValueError, "different devices.*NAME on meta"),
}


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(("bad", "error", "message"), BAD_FEATURES.values(), ids=BAD_FEATURES)
def test_bad_features(similarity, bad, error, message):
    head = make_head(similarity, 64, num_levels=4)
    with pytest.raises(error, match=message.replace("NAME", "image_features")):
        head(bad, GOOD)
    with pytest.raises(error, match=message.replace("NAME", "text_features")):
        head(GOOD, bad)


def test_units_of_a_list():
    with pytest.raises(TypeError, match="features is a list"):
        ESLHead(64, num_levels=4).image_units([1.0] * 64)


def test_head_on_another_device():
    with pytest.raises(ValueError, match="different devices"):
        ESLHead(64, num_levels=4).to("meta")(GOOD, GOOD)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@either
@either_path
def test_non_finite_features_are_named(aggregator, value, grad):
    head, bad = random_head(aggregator), torch.randn(40, 64)
    bad[[3, 17], [0, 63]] = value
    with torch.set_grad_enabled(grad):
        with pytest.raises(ValueError, match=r"image_features .* 2 of 40 rows: 3, 17$"):
            head(bad, GOOD)
        with pytest.raises(ValueError, match=r"text_features .* 2 of 40 rows: 3, 17$"):
            head(GOOD, bad)
        with pytest.raises(ValueError, match="3, 17"):
            head.text_units(bad)


@pytest.mark.parametrize("make", [random_head, lambda _: CosineHead(64), lambda a: random_head(a).narrowed(0.5)])
@either
@torch.no_grad()
def test_non_finite_features_are_named_by_every_head(make, aggregator):
    head, bad, more = make(aggregator), torch.randn(40, 64), torch.randn(90, 64)
    bad[[0, 17], [0, 63]] = torch.inf
    for images, texts in ((bad, more), (more, bad)):
        with pytest.raises(ValueError, match="2 of 40 rows: 0, 17"):
            head(images, texts)
    assert head(more[:0], more).shape == (0, 90)


def test_a_head_needs_no_towers():
    code = "import sys; sys.modules['open_clip'] = None; import esl_fast; esl_fast.ESLHead(64, num_levels=2)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tolerance_is_for_levels():
    with pytest.raises(TypeError, match="head is a CosineHead"):
        similarity(GOOD, GOOD, CosineHead(64), tolerance=0.1)


def test_huge_but_finite_features_pass():
    head = random_head("heuristic")
    x = torch.full((4, 64), 6e4, dtype=torch.float16)  # whose sum overflows
    assert head(x, x).isfinite().all()


# How PyTorch's machinery meets it


@either
def test_autocast(aggregator):
    head = random_head(aggregator)
    images, texts = torch.randn(5, 64), torch.randn(9, 64)
    expected = exact(head).similarity(images.double(), texts.double())
    with torch.autocast("cpu", torch.bfloat16):
        similarity = head(images.bfloat16(), texts.bfloat16())
        similarity.sum().backward()
        with torch.no_grad():
            assert relative_error(head(images, texts), expected) <= 2e-2
    assert relative_error(similarity, expected) <= 2e-2
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in head.parameters())


@either
def test_compiled_too_folds_the_smaller_side(aggregator):
    head = ESLHead(16, num_levels=2, aggregator=aggregator)
    few, many = torch.randn(3, 16), torch.randn(5, 16)
    sides = torch.compile(head.sides, fullgraph=True, backend="eager")
    torch.testing.assert_close(sides(few, many)[1], head.text_units(many))
    torch.testing.assert_close(sides(many, few)[0], head.image_units(many))


@either
def test_compiles_into_one_graph(aggregator):
    head = random_head(aggregator)
    images, texts = torch.randn(5, 64), torch.randn(9, 64)
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, texts), head(images, texts), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images, texts), head(images, texts), rtol=1e-5, atol=1e-6)


def some_loss(images, texts):
    return ops.contrastive_loss(images, texts, 3.0)


UNDER_AUTOCAST = {
    "head": lambda: (ESLHead(16, 2, 3), torch.randn(3, 16), torch.randn(5, 16)),
    "regions": lambda: (RegionWordHead(16, 2, 3), torch.randn(3, 2, 16), torch.randn(5, 4, 16), torch.ones(5).long()),
    "loss": lambda: (some_loss, torch.randn(5, 16), torch.randn(5, 16)),
    "topk": lambda: (lambda a, b: ops.topk(a, b, 2)[0], torch.randn(3, 16), torch.randn(5, 16)),
}


@pytest.mark.parametrize("make", UNDER_AUTOCAST.values(), ids=UNDER_AUTOCAST)
def test_compiles_into_one_graph_under_autocast(make):
    run, *arguments = make()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.compile(run, fullgraph=True, backend="eager")(*arguments)
        torch.testing.assert_close(found, run(*arguments), rtol=1e-5, atol=1e-6)


@either
def test_traced(aggregator):
    head = random_head(aggregator).eval()
    with torch.no_grad():
        traced = torch.jit.trace(head, (torch.randn(3, 64), torch.randn(4, 64)))
        for parameter in head.parameters():
            parameter.mul_(1.5)
        images, texts = torch.randn(2, 64), torch.randn(5, 64)
        torch.testing.assert_close(traced(images, texts), head(images, texts))


@either
@pytest.mark.parametrize("variant", [ESLHead, RegionWordHead])
def test_units_of_another_width(variant, aggregator):
    head = variant(32, 2, 4, aggregator)
    for units in (head.image_units, head.text_units):
        for width in (33, 48, 8):
            with pytest.raises(ValueError, match=rf"features have shape \(3, {width}\); expected \(..., 32\)"):
                units(torch.randn(3, width))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiles_to_machine_code():
    head = random_head("heuristic", 32, 2, 2)
    images, texts = torch.randn(5, 32), torch.randn(9, 32)
    with torch.no_grad():
        assert relative_error(torch.compile(head, fullgraph=True)(images, texts), head(images, texts)) <= 1e-5


@pytest.mark.parametrize("frozen", [False, True])
@either
def test_function_transforms(aggregator, frozen):
    head = random_head(aggregator).requires_grad_(not frozen)
    images, texts, step = torch.randn(3, 64), torch.randn(4, 64), torch.randn(3, 64)

    def score(image):
        return head(image[None], texts).sum()

    leaf = images.clone().requires_grad_()
    expected = torch.autograd.grad(head(leaf, texts).sum(), leaf)[0]
    torch.testing.assert_close(torch.func.grad(lambda x: head(x, texts).sum())(images), expected)
    torch.testing.assert_close(torch.vmap(torch.func.grad(score))(images), expected)
    torch.testing.assert_close(torch.vmap(score)(images), head(images, texts).sum(1))
    _, slope = torch.func.jvp(lambda x: head(x, texts).sum(), (images,), (step,))
    torch.testing.assert_close(slope, (expected * step).sum())
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(score)(images), head(images, texts).sum(1))


def step_in_place(head):
    torch.optim.SGD(head.parameters(), lr=1.0).step()


def load_other_weights(head):
    head.load_state_dict(random_head("adaptive").state_dict())


def assign_other_weights(head):
    head.load_state_dict(random_head("adaptive").state_dict(), assign=True)


def train_in_between(head):
    step_in_place(head.train())
    head.eval()


def change_dtype(head):
    head.double()
    load_other_weights(head)


@pytest.mark.parametrize(
    "change", [step_in_place, load_other_weights, assign_other_weights, train_in_between, change_dtype]
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_kept_selection_follows_the_weights(change, mode):
    head, images, texts = random_head("adaptive"), torch.randn(5, 64), torch.randn(9, 64)
    with mode():
        before = head(images, texts)
        torch.testing.assert_close(head(images, texts), before)
    for weight in head.parameters():
        weight.grad = torch.randn_like(weight)
    change(head)
    with mode():
        after = head(images, texts)
    assert relative_error(after, exact(head).similarity(images.double(), texts.double())) <= 1e-6
    assert relative_error(after, before) > 1e-2


@either
def test_copies_are_independent(aggregator):
    head, x = random_head(aggregator), torch.randn(5, 64)
    with torch.no_grad():
        before = head(x, x)
        twin = copy.deepcopy(head)
        for parameter in twin.parameters():
            parameter.mul_(1.5).add_(0.1)
        torch.testing.assert_close(head(x, x), before)
        assert relative_error(twin(x, x), exact(twin).similarity(x.double(), x.double())) <= 1e-6


# The other heads


def test_cosine():
    head = CosineHead(6)
    images, texts = torch.randn(2, 6), torch.randn(3, 6)
    expected = torch.nn.functional.cosine_similarity(images[:, None], texts[None], dim=-1)
    torch.testing.assert_close(head(images, texts), expected)
    assert not list(head.parameters())


def test_heads_by_name():
    assert make_head("esl-adaptive", 27, kernel_size=3, num_levels=2).dims == [27, 9, 3]
    with pytest.raises(ValueError, match="'esl-heuristic', 'esl-adaptive', 'cosine'"):
        make_head("esl", 64)


@pytest.mark.parametrize("aggregator", ["heuristic", "adaptive"])
def test_a_step_that_no_version_shows_is_seen(aggregator, monkeypatch):
    monkeypatch.setattr(torch, "equal", lambda *pair: True)  # as on a GPU, where values are not compared
    head = ESLHead(16, 2, 3, aggregator).eval()
    images, texts = torch.randn(3, 16), torch.randn(5, 16)
    with torch.no_grad():
        before = head(images, texts)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, fused=True)
    head(images, texts).sum().backward()
    optimizer.step()
    fresh = ESLHead(16, 2, 3, aggregator).eval()
    fresh.load_state_dict(head.state_dict())
    with torch.no_grad():
        after, expected = head(images, texts), fresh(images, texts)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, expected)


def training_in_evaluation_mode(head, optimizer, images, texts):
    head(images, texts).sum().backward()
    with torch.no_grad():
        head(images, texts)
    optimizer.step()


def training_by_function(head, optimizer, images, texts):
    names = dict(head.named_parameters())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(head, p, (images, texts)).sum())(names)
    for name, parameter in names.items():
        parameter.grad = gradients[name].detach().contiguous()
    optimizer.step()


@pytest.mark.parametrize("train", [training_in_evaluation_mode, training_by_function])
@pytest.mark.parametrize("aggregator", ["heuristic", "adaptive"])
def test_steps_between_evaluations_are_seen(aggregator, train, monkeypatch):
    monkeypatch.setattr(torch, "equal", lambda *pair: True)  # as on a GPU, where values are not compared
    head = ESLHead(16, 2, 3, aggregator).eval()
    images, texts = torch.randn(3, 16), torch.randn(5, 16)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        with torch.no_grad():
            head(images, texts)
        train(head, optimizer, images, texts)
    fresh = ESLHead(16, 2, 3, aggregator).eval()
    fresh.load_state_dict(head.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(head(images, texts), fresh(images, texts))


def test_what_is_called_may_still_be_swapped():
    head = ESLHead(16, 2, 3).eval()
    with torch.no_grad():
        head(torch.randn(3, 16), torch.randn(5, 16))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        head.load_state_dict(ESLHead(16, 2, 3).state_dict())
        head.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_methods_replaced_on_the_object_are_called():
    head, images, texts = ESLHead(16, 2, 3).eval(), torch.randn(3, 16), torch.randn(5, 16)
    units = head.text_units
    expected = head(images, texts)
    head.text_units = lambda y: 2 * units(y)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(head(images, texts), 2 * expected)


@pytest.mark.parametrize("make", [lambda: ESLHead(16, 2, 3), lambda: CosineHead(16)], ids=["esl", "cosine"])
def test_scores_replaced_on_the_object_are_asked_for(make):
    head, images, texts = make().eval(), torch.randn(3, 16), torch.randn(5, 16)
    scores = head.scores
    expected = head(images, texts)
    head.scores = lambda x, y: scores(2 * x, x.new_zeros(5, 16).copy_(y[[0] * 5]))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(head(images, texts), expected[:, :1].expand(3, 5))


def test_levels_replaced_on_the_object_are_taken():
    head, images, texts = ESLHead(16, 2, 3, "adaptive").eval(), torch.randn(3, 16), torch.randn(5, 16)
    with torch.no_grad():
        head(images, texts)
        levels = head.image.levels
        head.image.levels = lambda: ([weight.flip(1) for weight in levels()[0]], None)
        torch.testing.assert_close(head(images, texts), head.scores(images, texts).matrix())


PRUNED = {
    "degrees": lambda head: (head.contribution, "w"),
    "a matrix": lambda head: (head.contribution.matrices, "0"),
    "an aggregator": lambda head: (head.image.weights, "0"),
}


@pytest.mark.parametrize("where", PRUNED.values(), ids=PRUNED)
def test_pruned_heads_train(where):
    head, images, texts = ESLHead(16, 2, 3, "adaptive"), torch.randn(3, 16), torch.randn(5, 16)
    part, name = where(head)
    prune.random_unstructured(part, name, 0.5)
    original = getattr(part, f"{name}_orig")
    for _ in range(2):
        head(images, texts).sum().backward()
    assert original.grad.any()
    head.eval()
    with torch.no_grad():
        before = head(images, texts)
        original.copy_(torch.rand_like(original))
        after = head(images, texts)
    assert not torch.equal(before, after)
    narrowed = head.narrowed(0)
    for _ in range(2):
        narrowed(images, texts).sum().backward()
    with pytest.raises(ValueError, match="is no plain parameter"):
        head.to_official()
    prune.remove(part, name)
    torch.testing.assert_close(head(images, texts), after)
    head.to_official()


@either
def test_hooks_of_the_contribution_fire(aggregator):
    for head, features in (
        (ESLHead(16, 2, 3, aggregator).eval(), (torch.randn(3, 16), torch.randn(5, 16))),
        (RegionWordHead(16, 2, 3, aggregator), (torch.randn(3, 4, 16), torch.randn(5, 2, 16), torch.ones(5).long())),
    ):
        seen = []
        head.contribution.register_forward_hook(lambda *call, seen=seen: seen.append(1))
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                head(*features)
        assert len(seen) == 2


def test_scores_may_be_overridden():
    class Doubled(CosineHead):
        def scores(self, x, y):
            return super().scores(x.new_ones(2, 16), y)

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert Doubled(16)(torch.randn(3, 16), torch.randn(5, 16)).shape == (2, 5)


@pytest.mark.parametrize("base", [ESLHead, CosineHead])
def test_sides_may_be_overridden(base):
    class Doubled(base):
        def sides(self, *features):
            image_side, text_side = super().sides(*features)
            return 2 * image_side, text_side

    options = {"num_levels": 3} if base is ESLHead else {}
    head, doubled = base(16, **options).eval(), Doubled(16, **options).eval()
    doubled.load_state_dict(head.state_dict())
    images, texts = torch.randn(3, 16), torch.randn(5, 16)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(doubled(images, texts), 2 * head(images, texts))
            torch.testing.assert_close(doubled.scores(images, texts).matrix(), 2 * head(images, texts))


@either
def test_exported_for_all_batch_sizes(aggregator):
    head = ESLHead(16, 2, 3, aggregator)
    sizes = {name: {0: torch.export.Dim(name)} for name in ("images", "texts")}
    exported = torch.export.export(head, (torch.randn(7, 16), torch.randn(5, 16)), dynamic_shapes=tuple(sizes.values()))
    for n, m in ((7, 5), (3, 5)):
        images, texts = torch.randn(n, 16), torch.randn(m, 16)
        torch.testing.assert_close(exported.module()(images, texts), head(images, texts))


def test_a_compiled_optimizer_is_not_recompiled():
    head = ESLHead(16, 2, 3)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1)
    head(torch.randn(3, 16), torch.randn(5, 16)).sum().backward()
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    step()
    with torch.compiler.set_stance("fail_on_recompile"):
        step()
        step()


@either
def test_dtypes_and_back(aggregator, monkeypatch):
    monkeypatch.setattr(torch, "equal", lambda *pair: True)
    head, x = random_head(aggregator), torch.randn(5, 64)
    with torch.no_grad():
        head(x, x)
        head.bfloat16().float()
        assert relative_error(head(x, x), exact(head).similarity(x.double(), x.double())) <= 1e-6


@either
def test_fake_tensors_are_not_kept(aggregator):
    head, x = random_head(aggregator), torch.randn(5, 64)
    with torch.no_grad():
        expected = head(x, x)
        head.train().eval()
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert head(x, x).shape == (5, 5)
        assert torch.equal(head(x, x), expected)


@either
@pytest.mark.parametrize("frozen", [False, True])
def test_forward_mode_differentiation(aggregator, frozen):
    head = random_head(aggregator).requires_grad_(not frozen)
    x, y, direction = torch.randn(5, 64), torch.randn(7, 64), torch.randn(5, 64)
    _, expected = torch.func.jvp(lambda x: head(x, y), (x,), (direction,))
    with forward_ad.dual_level(), contextlib.nullcontext() if not frozen else torch.no_grad():
        found = forward_ad.unpack_dual(head(forward_ad.make_dual(x, direction), y)).tangent
    torch.testing.assert_close(found, expected)


@either
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_heads_of_half_precision(aggregator, dtype):
    """Half-precision weights are numbers like any others: nothing made of them is rounded to their precision."""
    head, x, y = random_head(aggregator).to(dtype), torch.randn(5, 64), torch.randn(9, 64)
    with torch.no_grad():
        head.contribution.w.copy_(torch.linspace(0.4, 0.1, len(head.dims)))
    expected = exact(head).similarity(x.double(), y.double())
    assert relative_error(head(x, y), expected) <= 1e-5
    with torch.no_grad():
        assert relative_error(head(x, y), expected) <= 1e-5


# What is put in the way of a head's parts


class Tripled(ESLHead):
    def text_units(self, y):
        return super().text_units(y) * 3


class Wrapper(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, levels=None):
        return 3 * self.inner(x, levels)


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("how", ["subclass", "hook", "wrapper"])
def test_what_replaces_or_observes_a_part_is_called(how, grad):
    head, x, y = random_head("heuristic"), torch.randn(5, 64), torch.randn(9, 64)
    with grad():
        expected = 3 * head(x, y)
        if how == "subclass":
            head = Tripled.from_official(head.to_official()).eval()
        elif how == "hook":
            head.text.register_forward_hook(lambda module, args, units: 3 * units)
        else:
            head.text = Wrapper(head.text)
        torch.testing.assert_close(head(x, y), expected)


@pytest.mark.parametrize("aggregator", ["heuristic", "adaptive"])
def test_ensembles_by_vmap(aggregator):
    heads = [ESLHead(16, 2, 3, aggregator).eval() for _ in range(3)]
    images, texts = torch.randn(3, 16), torch.randn(5, 16)
    parameters, buffers = torch.func.stack_module_state(heads)

    def score(parameters, buffers):
        return torch.func.functional_call(heads[0], (parameters, buffers), (images, texts))

    with torch.no_grad():
        found = torch.vmap(score)(parameters, buffers)
        expected = torch.stack([head(images, texts) for head in heads])
    torch.testing.assert_close(found, expected)
