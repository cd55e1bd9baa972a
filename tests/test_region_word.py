"""Region-word similarity: the definition against golden files, the blocked path against the definition."""

import pytest
import torch
from helpers import golden_files, gradient_errors, load_golden, relative_error

from esl_fast.blocked import region_word as blocked
from esl_fast.ops import region_word as ops
from esl_fast.ops.backend import use_backend
from esl_fast.reference import region_word as reference
from esl_fast.reference.aggregate import aggregate, select_top2
from esl_fast.reference.contribution import degrees, fold, normed_matrix

GOLDEN = [pytest.param(path, id=path.stem) for path in golden_files("region_word_*.safetensors")]
IMPLEMENTATIONS = {"reference": reference.region_word_similarity, "blocked": blocked.region_word_similarity}


def definition(parameters, regions, words, word_lengths, similarity):
    """The whole variant from its official parameters: aggregation, contribution, similarity."""
    levels = sum("lynorm" in key and key.endswith("bias") for key in parameters)

    def weights(side):
        prefix = f"plus_encoder.encoders_1.{side}_levels."
        taps = f"{prefix}kernel_{'img' if side == 'image' else 'txt'}_"
        if f"{taps}1.weight" in parameters:
            return [parameters[f"{taps}{k}.weight"].sum((0, 1)) for k in range(1, levels)]
        return [select_top2(parameters[f"{prefix}masks_{k}.weight"]) for k in range(1, levels)]

    def of(name):
        return parameters[f"sims.calculator_1.{name}"]

    region_units = aggregate(regions, weights("image"), chain="normalized", normalize=False)
    word_units = aggregate(words, weights("text"), chain="raw", normalize=False)
    matrices = [
        normed_matrix(of(f"masks_{k}.weight"), of(f"lynorm_{k}.weight"), of(f"lynorm_{k}.bias")) for k in range(levels)
    ]
    heuristic = any("kernel_img" in key for key in parameters)
    sharpness = of("temp_scale_2.weight").squeeze().exp() * heuristic
    degree = degrees(of("sim_eval.weight").squeeze(0), of("temp_scale_1.weight").squeeze(), sharpness)
    # Caption on the left of D: folding it multiplies by the transpose, as folding an image of x^T D y does.
    folded = fold(word_units, matrices, degree, side="image")
    return region_units, word_units, similarity(
        region_units, folded, of("temp_scale.weight").exp().reshape(()), word_lengths
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("path", GOLDEN)
def test_golden(path, implementation):
    parameters, golden = load_golden(path)
    leaves = {name: value.double().requires_grad_() for name, value in parameters.items()}
    inputs = {name: golden[name].double().requires_grad_() for name in ("image_features", "text_features")}
    features = (inputs["image_features"], inputs["text_features"], golden["text_lengths"])
    region_units, word_units, scores = definition(leaves, *features, IMPLEMENTATIONS[implementation])
    assert relative_error(region_units, golden["image_units"]) < 1e-5
    real = torch.arange(word_units.shape[1]) < golden["text_lengths"][:, None]
    assert relative_error(word_units[real], golden["text_units"][real]) < 1e-5
    assert relative_error(scores, golden["similarity"]) <= 1e-5
    if "grad_output" in golden:
        (scores * golden["grad_output"]).sum().backward()
        expected = {key.removeprefix("grad."): value for key, value in golden.items() if key.startswith("grad.")}
        actual = {name: (leaves | inputs)[name].grad for name in expected}
        errors = gradient_errors({k: torch.zeros(()) if v is None else v for k, v in actual.items()}, expected)
        assert max(errors.values()) <= 3e-4, max(errors.items(), key=lambda item: item[1])


def case(n, regions, m, words, width, *, padded_regions=False, units_major=False, dtype=torch.float64):
    """Random inputs whose padding is NaN."""

    def units(count, length):
        x = torch.nn.functional.normalize(torch.randn(count, length, width, dtype=dtype), dim=-1)
        if units_major:
            x = x.reshape(-1, width).mT.contiguous().mT.view(count, length, width)
        return x

    region_units, word_units = units(n, regions), 2 * units(m, words)
    word_lengths = torch.randint(1, words + 1, (m,))
    region_lengths = torch.randint(1, regions + 1, (n,)) if padded_regions else None
    word_units[torch.arange(words) >= word_lengths[:, None]] = torch.nan
    if padded_regions:
        region_units[torch.arange(regions) >= region_lengths[:, None]] = torch.nan
    smooth = torch.tensor(14.3, dtype=dtype)
    return [t.requires_grad_() for t in (region_units, word_units, smooth)], word_lengths, region_lengths


def gradients(scores, grad, tensors):
    return torch.autograd.grad((scores * grad).sum(), tensors)


@pytest.mark.parametrize("blocks", [None, (20, 16, 100), (1, 1, 1)])
@pytest.mark.parametrize("units_major", [False, True])
@pytest.mark.parametrize("padded_regions", [False, True])
@pytest.mark.parametrize("sizes", [(5, 7, 9, 11, 40), (1, 1, 1, 1, 3), (3, 3, 2, 140, 8), (150, 2, 5, 20, 6)])
def test_blocked(monkeypatch, sizes, padded_regions, units_major, blocks):
    if blocks is not None:
        for name, size in zip(("BLOCK_REGIONS", "BLOCK_WORDS", "BLOCK_REDUCED"), blocks, strict=True):
            monkeypatch.setattr(blocked, name, size)
    tensors, word_lengths, region_lengths = case(*sizes, padded_regions=padded_regions, units_major=units_major)
    expected = reference.region_word_similarity(*tensors, word_lengths, region_lengths)
    actual = blocked.region_word_similarity(*tensors, word_lengths, region_lengths)
    assert relative_error(actual, expected) < 1e-13
    grad = torch.randn_like(expected)
    wanted = gradients(expected, grad, tensors)
    for got, want in zip(gradients(actual, grad, tensors), wanted, strict=True):
        # Gradients through a norm near 0 are huge and lose digits, in the definition too.
        assert (got - want).norm() <= 1e-8 * max(want.norm(), 1e-6)


def test_blocked_slices():
    """Inputs with gaps in memory."""
    (region_units, word_units, smooth), word_lengths, _ = case(6, 8, 10, 12, 10)
    cut = [region_units[::2, 1:7, 1:9].detach(), word_units[1::3, :, 1:9].detach(), smooth.detach()]
    lengths = word_lengths[1::3]
    expected = reference.region_word_similarity(*cut, lengths)
    assert relative_error(blocked.region_word_similarity(*cut, lengths), expected) < 1e-13
    major = [t.movedim(-1, 0).contiguous().movedim(0, -1)[:, :5] for t in cut[:2]]
    expected = reference.region_word_similarity(*major, smooth, lengths.clamp(max=5))
    assert relative_error(blocked.region_word_similarity(*major, smooth, lengths.clamp(max=5)), expected) < 1e-13


@pytest.mark.parametrize(("regions", "words"), [(5, 1), (1, 5)])
def test_gradients_of_lone_units(regions, words):
    """Of one word or region only the epsilon of its norm leaves a gradient through the attention: no rounding may."""
    (region_units, word_units, smooth), word_lengths, _ = case(6, regions, 7, words, 40, dtype=torch.float32)
    tensors = [region_units, (1e-2 * word_units.detach()).requires_grad_(), smooth]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    grad = torch.randn(6, 7)
    actual = gradients(blocked.region_word_similarity(*tensors, word_lengths), grad, tensors)
    expected = gradients(reference.region_word_similarity(*exact, word_lengths), grad, exact)
    for got, want in zip(actual[:2], expected, strict=False):
        assert relative_error(got, want) < 2e-6


def test_autocast_changes_nothing():
    tensors, word_lengths, _ = case(5, 7, 6, 9, 40, dtype=torch.float32)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            scores = ops.region_word_similarity(*tensors, word_lengths)
            found.append((scores, *torch.autograd.grad(scores.sum(), tensors)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 4), (3, 0)])
def test_empty(n, m):
    tensors, word_lengths, _ = case(n, 3, m, 5, 6)
    scores = ops.region_word_similarity(*tensors, word_lengths)
    assert scores.shape == (n, m)
    scores.sum().backward()
    assert all(t.grad is not None and not t.grad.any() for t in tensors)


@pytest.mark.parametrize("padded_regions", [False, True])
@pytest.mark.parametrize(("smooth", "tolerance"), [(0, 1e-6), (59, 1e-5), (61, 1e-5), (900, 1e-4), (-900, 1e-4)])
def test_any_smooth(smooth, tolerance, padded_regions):
    """Exponentials that, of the largest, overflow or vanish unless the maximum is subtracted."""
    (region_units, word_units, _), *lengths = case(3, 5, 4, 6, 12, padded_regions=padded_regions, dtype=torch.float32)
    word_units = -word_units.abs()  # of nonnegative regions: the largest of b is far from 0, where padding is
    tensors = (region_units.abs(), word_units, torch.tensor(float(smooth)))
    expected = reference.region_word_similarity(*(t.double() for t in tensors), *lengths)
    assert relative_error(blocked.region_word_similarity(*tensors, *lengths), expected) < tolerance


def test_half_precision():
    tensors, word_lengths, _ = case(5, 7, 6, 9, 40, dtype=torch.float32)
    half = [tensors[0].bfloat16(), tensors[1].bfloat16(), tensors[2]]
    expected = reference.region_word_similarity(*(t.double() for t in half), word_lengths)
    scores = ops.region_word_similarity(*half, word_lengths)
    assert scores.dtype == torch.float32
    assert relative_error(scores, expected) < 1e-5


SUBSETS = [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]


@pytest.mark.parametrize("wanted", SUBSETS)
def test_subsets_of_gradients(wanted):
    tensors, word_lengths, _ = case(3, 4, 5, 6, 7)
    chosen = [t for t, w in zip(tensors, wanted, strict=True) if w]
    inputs = [t if w else t.detach() for t, w in zip(tensors, wanted, strict=True)]
    grad = torch.randn(3, 5, dtype=torch.float64)
    actual = gradients(blocked.region_word_similarity(*inputs, word_lengths), grad, chosen)
    expected = gradients(reference.region_word_similarity(*inputs, word_lengths), grad, chosen)
    for got, want in zip(actual, expected, strict=True):
        assert relative_error(got, want) < 1e-10


def test_opcheck():
    tensors, word_lengths, region_lengths = case(3, 4, 5, 6, 7, padded_regions=True)
    clean = [t.detach().nan_to_num().requires_grad_() for t in tensors]
    torch.library.opcheck(blocked._forward, (*clean, word_lengths, region_lengths))


def test_memory_is_bounded():
    """400 x 60 pairs of 36 regions and up to 128 words: all products would take more than 200 MB."""
    (region_units, word_units, smooth), word_lengths, _ = case(400, 36, 60, 128, 8, dtype=torch.float32)
    inputs = (region_units.detach(), word_units.detach(), smooth.detach(), word_lengths)
    with torch.profiler.profile(profile_memory=True) as profile:
        blocked.region_word_similarity(*inputs)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 0 < peak < 40e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"word_lengths": torch.tensor([2, 1, 5, 0])}, "caption 3 has no words"),
        ({"word_lengths": torch.tensor([2, 6, 5, 1])}, r"caption 1 has 6 words \(word_lengths\); expected 1\.\.5"),
        ({"word_lengths": torch.tensor([2, 1, 5])}, "word_lengths has shape"),
        ({"word_lengths": torch.ones(4)}, "word_lengths has dtype torch.float32"),
        ({"region_lengths": torch.tensor([0, 1, 1])}, "image 0 has no regions"),
        ({"region_lengths": torch.tensor([1, -1, 1])}, "image 1 has -1 regions"),
        ({"region_units": torch.zeros(3, 6)}, "region_units has shape"),
        ({"region_units": torch.zeros(3, 0, 6)}, "region_units has shape"),
        ({"word_units": torch.zeros(4, 5, 7)}, r"word_units has shape \(4, 5, 7\); expected \(M, W, 6\)"),
        ({"word_units": torch.zeros(4, 5, 6, dtype=torch.long)}, "word_units has dtype torch.int64"),
        ({"word_units": torch.zeros(4, 5, 6, dtype=torch.half)}, "expected one dtype"),
        ({"smooth": torch.zeros(2)}, "smooth has shape"),
    ],
)
def test_bad_input(change, message):
    good = {
        "region_units": torch.zeros(3, 2, 6),
        "word_units": torch.zeros(4, 5, 6),
        "smooth": 14.0,
        "word_lengths": torch.tensor([2, 1, 5, 3]),
    }
    with use_backend("torch"), pytest.raises((TypeError, ValueError), match=message):
        ops.region_word_similarity(**(good | change))
