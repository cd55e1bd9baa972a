"""Towers, tokenizers, preprocessing, freezing, and the model they form."""

import json
import math

import open_clip
import pytest
import torch
from helpers import RESNET, TEXT, clip_config, features_model, small_model
from PIL import Image

from esl_fast.model import SIMILARITIES, MatchingModel, ModelConfig, towers

START, END = 49406, 49407
CAPTIONS = ["a dog", "two birds on a wire"]


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_open_clip_towers(similarity):
    model = small_model(similarity=similarity)
    images, tokens = torch.randn(3, 3, 32, 32), model.tokenize(CAPTIONS)
    similarity = model(images, tokens)
    assert similarity.shape == (3, 2)
    torch.testing.assert_close(similarity, model.head(model.encode_image(images), model.encode_text(tokens)))
    assert model.encode_image(images).norm(dim=-1).sub(1).abs().min() > 1e-3  # as they are before normalisation
    similarity.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name != "logit_scale")


@pytest.mark.parametrize("similarity", [*SIMILARITIES, "region-word-heuristic"])
def test_batches_of_nothing(similarity):
    model = small_model(similarity=similarity)
    images, tokens = torch.randn(3, 3, 32, 32), torch.randint(1, 1000, (2, 16))
    tokens[:, -1] = END
    for i, j in ((0, 2), (3, 0), (0, 0)):
        assert model(images[:i], tokens[:j]).shape == (i, j)


def test_features_are_open_clips_own():
    model, images, tokens = small_model(), torch.randn(3, 3, 32, 32), torch.randint(1, 1000, (2, 16))
    clip = open_clip.CustomTextCLIP(**clip_config()).eval()
    clip.visual, clip.text = model.image_tower, model.text_tower
    torch.testing.assert_close(model.encode_image(images), clip.encode_image(images))
    torch.testing.assert_close(model.encode_text(tokens), clip.encode_text(tokens))


def test_precomputed_features():
    model = features_model()
    features = torch.randn(5, 12)
    torch.testing.assert_close(
        model.encode_image(features), features @ model.image_tower.proj.weight.T + model.image_tower.proj.bias
    )
    assert model.image_transform is None
    mixed = small_model(image_tower="features", feature_dim=12)
    assert mixed(features, mixed.tokenize(CAPTIONS)).shape == (5, 2)


@pytest.mark.parametrize(
    ("side", "given", "error", "message"),
    [
        ("image", ["a.jpg"], TypeError, "images is a list"),
        ("image", torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, "images has dtype torch.uint8"),
        ("image", torch.zeros(3, 32, 32), ValueError, r"images has shape \(3, 32, 32\); expected \(N, 3, H, W\)"),
        ("image", torch.zeros(2, 32, 32, 3), ValueError, r"expected \(N, 3, H, W\)"),
        ("features", torch.zeros(2, 11), ValueError, r"images has shape \(2, 11\); expected \(N, 12\)"),
        ("text", CAPTIONS, TypeError, "tokens is list; expected token ids, which model.tokenize makes"),
        ("text", torch.zeros(2, 16), TypeError, "tokens is torch.float32"),
        ("text", torch.ones(16, dtype=torch.int64), ValueError, r"tokens has shape \(16,\); expected \(M, T\)"),
    ],
)
def test_what_towers_do_not_read_is_refused(side, given, error, message):
    model = features_model() if side == "features" else small_model()
    with pytest.raises(error, match=message):
        (model.encode_text if side == "text" else model.encode_image)(given)


@pytest.fixture
def bag():
    bag = towers.BagOfTokens(5, 6)
    bag.know(torch.tensor([[START, 5, 9, END, 0], [START, 9, 700, END, 0]]))
    return bag


def test_bag_of_tokens(bag):
    entry = dict(zip((5, 9, 700), bag.embedding.weight[2:], strict=True))
    tokens = torch.tensor([
        [START, 5, 9, 9, END, 0],  # each occurrence counts
        [START, 9, 9, 5, END, 0],  # order does not
        [START, 5, 33, 44, END, 0],  # unknown tokens stay out of the mean
        [START, 33, END, 0, 0, 0],
        [START, END, 0, 0, 0, 0],
    ])  # fmt: skip
    pair = (entry[5] + 2 * entry[9]) / 3
    nothing = bag.embedding.weight[1]  # a caption without known tokens has a direction of its own
    expected = torch.stack([pair, pair, entry[5], nothing, nothing])
    features = bag(tokens)
    torch.testing.assert_close(features, expected)
    features[:3].sum().backward()
    assert not bag.embedding.weight.grad[0].any()
    assert not bag.embedding.weight.grad[4].any()  # of 700, which no caption has


def test_bag_knows_what_it_was_last_told(bag):
    bag.know(torch.tensor([[START, 1, 2, 3, END, 0]]))
    assert bag.entry_of.nonzero().flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize("tokens", [[5, 9], [5, 9, 11, 13]])
def test_bag_of_another_size(bag, tokens):
    with pytest.raises(ValueError, match=f"{len(tokens)} distinct tokens given; this tower has 3"):
        bag.know(torch.tensor([tokens]))


# Configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_tower": "resnet"}, "image_tower is 'resnet'; accepted: 'open_clip', 'features'"),
        ({"text_tower": "lstm"}, "text_tower is 'lstm'; accepted: 'open_clip', 'bag'"),
        ({"clip": None}, "needs the open_clip configuration"),
        ({"image_tower": "features"}, "feature_dim is missing"),
        ({"text_tower": "bag"}, "bag_size is missing"),
        ({"clip": None, "image_tower": "features", "feature_dim": 3, "text_tower": "bag", "bag_size": 3}, "embed_dim"),
        ({"similarity": "euclid"}, "'esl-heuristic', 'esl-adaptive', 'cosine'"),
        ({"num_levels": 6}, "num_levels may be at most 5"),
    ],
)
def test_configurations_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        small_model(**changes)


def test_configuration_survives_json():
    config = small_model().config
    assert ModelConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("model", "pretrained", "quick"),
    [
        ("ViT-B-16", "openai", True),
        ("ViT-B-16", "laion2b_s34b_b88k", False),
        ("ViT-B-16", None, False),
        ("ViT-B-16-quickgelu", None, True),
        ("RN50", "openai", True),
    ],
)
def test_quick_gelu_follows_the_weights(model, pretrained, quick):
    config = towers.open_clip_config(model, pretrained)
    assert config.get("quick_gelu", False) == quick
    assert config["preprocess"]["interpolation"] == "bicubic"
    assert config["preprocess"]["mean"][0] == pytest.approx(0.48145466)


def test_quick_gelu_reaches_both_towers():
    def activations(quick_gelu):
        modules = small_model(clip=clip_config(quick_gelu=quick_gelu)).modules()
        return {type(m).__name__ for m in modules if "GELU" in type(m).__name__}

    assert activations(True) == {"QuickGELU"}
    assert activations(False) == {"GELU"}


def test_configuration_from_a_file(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(clip_config(custom_text=True)))
    config = towers.open_clip_config(str(path))
    assert {key: config[key] for key in clip_config()} == clip_config()
    MatchingModel(ModelConfig(clip=config, num_levels=2))
    for content, message in (("{", "not JSON"), ("[]", "without embed_dim, text_cfg, vision_cfg")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            towers.open_clip_config(str(path))
    for wrong in ({"text_cfg": TEXT | {"heads": 7}}, {"vision_cfg": None}):
        with pytest.raises(ValueError, match="open_clip cannot build"):
            towers.build_clip(clip_config(**wrong))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ViT-Z",), "model is 'ViT-Z'"),
        (("ViT-B-16", "mine"), "known: openai.*laion2b"),
        (("coca_ViT-B-32",), "CoCa has a third tower"),
    ],
)
def test_unknown_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        towers.open_clip_config(*arguments)


# Pretrained weights from a file


class Parts(torch.nn.Module):
    """Parameters under dotted names, nothing else: what is in an OpenAI archive as far as its reader can tell."""

    def __init__(self, tensors):
        super().__init__()
        children = {}
        for name, value in tensors.items():
            first, _, rest = name.partition(".")
            if rest:
                children.setdefault(first, {})[rest] = value
            else:
                self.register_parameter(first, torch.nn.Parameter(value, requires_grad=value.is_floating_point()))
        for name, inside in children.items():
            self.add_module(name, Parts(inside))

    def forward(self, x):
        return x


@pytest.fixture
def clip():
    return open_clip.CLIP(**clip_config())


def same_towers(model, clip):
    expected = towers.open_clip.model.convert_to_custom_text_state_dict(dict(clip.state_dict()))
    visual = {f"visual.{key}": value for key, value in model.image_tower.state_dict().items()}
    text = {f"text.{key}": value for key, value in model.text_tower.state_dict().items()}
    own = visual | text | {"logit_scale": model.logit_scale.data}
    return own.keys() == expected.keys() and all(torch.equal(own[key], expected[key].float()) for key in own)


def test_weights_in_open_clips_format(tmp_path, clip):
    clip.logit_scale.data.fill_(3.3)
    torch.save({"state_dict": clip.state_dict()}, tmp_path / "clip.pt")
    path = str(tmp_path / "clip.pt")
    assert not towers.is_torchscript(path)
    assert same_towers(MatchingModel(ModelConfig(clip=clip_config(), num_levels=2), pretrained=path), clip)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_weights_in_openais_format(tmp_path, clip):
    clip = clip.half()
    sizes = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(16), "vocab_size": torch.tensor(9)}
    path = str(tmp_path / "ViT.pt")
    torch.jit.trace(Parts(clip.state_dict() | sizes), torch.zeros(1)).save(path)
    assert towers.is_torchscript(path)
    assert towers.open_clip_config("ViT-B-16", path)["quick_gelu"]
    assert same_towers(MatchingModel(ModelConfig(clip=clip_config(), num_levels=2), pretrained=path), clip)


# Inputs


def test_tokenizer_keeps_the_end_of_a_long_caption():
    model = small_model()
    tokens = model.tokenize(["dog " * 40, "dog", ""])
    assert tokens.shape == (3, 16)
    assert tokens[:, 0].tolist() == [START] * 3
    assert tokens[0, -1] == END
    assert (tokens[0] == END).sum() == 1
    assert tokens[1].count_nonzero() == 3
    assert tokens[2].tolist() == [START, END] + [0] * 14
    assert features_model().tokenize(["dog"]).shape == (1, 77)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_image_transform(mode):
    model = small_model(clip=clip_config(preprocess=towers.default_preprocess()))
    pixels = model.image_transform(Image.new(mode, (50, 33), 255 if mode in "LP" else "white"))
    assert pixels.shape == (3, 32, 32)
    if mode != "P":
        mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
        torch.testing.assert_close(pixels[:, 16, 16], (1 - mean) / std)


# Freezing


def frozen_parts(model, **options):
    """What is frozen, each layer as one name."""
    model.freeze(**options)
    parts = {}
    for name, parameter in model.named_parameters():
        part = name.split(".resblocks.")
        part = f"{part[0]}.{part[1][0]}" if len(part) == 2 else name.removesuffix(".weight").removesuffix(".bias")
        parts.setdefault(part, set()).add(not parameter.requires_grad)
    assert all(len(states) == 1 for states in parts.values()), "a layer is frozen in part"
    return {part for part, (frozen,) in parts.items() if frozen}


IMAGE_STEM = {f"image_tower.{name}" for name in ("class_embedding", "positional_embedding", "conv1", "ln_pre")}
TEXT_STEM = {f"text_tower.{name}" for name in ("token_embedding", "positional_embedding")}
IMAGE_LAYERS = ["image_tower.transformer.0", "image_tower.transformer.1"]
TEXT_LAYERS = ["text_tower.transformer.0", "text_tower.transformer.1"]
FREEZES = [
    ({}, set()),
    ({"image_tower": True}, IMAGE_STEM | {*IMAGE_LAYERS, "image_tower.ln_post", "image_tower.proj"}),
    ({"text_tower": True}, TEXT_STEM | {*TEXT_LAYERS, "text_tower.ln_final", "text_tower.text_projection"}),
    ({"image_layers": 1}, IMAGE_STEM | {IMAGE_LAYERS[0]}),
    ({"image_layers": 2, "text_layers": 1}, IMAGE_STEM | TEXT_STEM | {*IMAGE_LAYERS, TEXT_LAYERS[0]}),
]


@pytest.mark.parametrize(("options", "expected"), FREEZES, ids=[str(options) for options, _ in FREEZES])
def test_freezing(options, expected):
    assert frozen_parts(small_model(), **options) == expected


def test_freezing_a_resnet():
    model = small_model(clip=clip_config(vision_cfg=RESNET))
    model.freeze(image_layers=2)
    trained = {name.split(".")[0] for name, p in model.image_tower.named_parameters() if p.requires_grad}
    assert trained == {"layer3", "layer4", "attnpool"}


@pytest.mark.parametrize("layers", [3, -1])
def test_freezing_layers_that_are_not_there(layers):
    with pytest.raises(ValueError, match=f"cannot freeze {layers} layers: VisionTransformer has 2"):
        small_model().freeze(image_layers=layers)
    with pytest.raises(ValueError, match="BagOfTokens has 0"):
        features_model().freeze(text_layers=1)


# Temperature


@pytest.mark.parametrize(("before", "after"), [(7.0, math.log(100)), (2.0, 2.0), (-1.0, -1.0)])
def test_logit_scale_is_clamped(before, after):
    model = features_model()
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    model.logit_scale.data.fill_(before)
    model.clamp_logit_scale()
    assert model.logit_scale.item() == pytest.approx(after)
    assert model.logit_scale.requires_grad


def test_context_length_is_the_text_towers():
    model = small_model(clip=clip_config(text_cfg=TEXT | {"context_length": 9}))
    assert model.encode_text(model.tokenize(CAPTIONS)).shape == (2, 32)
