"""The drawn data set: reproducible, its captions true of their pictures, and every picture told apart by them."""

import re
from dataclasses import dataclass
from random import Random

import numpy as np
import pytest

from esl_fast.data import DataError, load_dataset
from esl_fast.data.shapes import (
    BACKGROUNDS,
    COLOUR_WORDS,
    COLOURS,
    COUNT_WORDS,
    INVERSE,
    RELATION_WORDS,
    SHAPES,
    SIZE_WORDS,
    Group,
    Scene,
    describe,
    render,
)
from esl_fast.data.synthetic import sample_scenes

SIZE = (60, 24, 24)
SINGULARS = ("shape", "object", *(word for words in SHAPES.values() for word in words))


@dataclass
class Claim:
    """What a caption says, read from its words; None where it says nothing."""

    groups: list[dict]
    relation: str | None
    background: str | None

    def is_true_of(self, scene: Scene) -> bool:
        if self.background not in (None, scene.background):
            return False
        orders = [(scene.groups, scene.relation)]
        if scene.relation is not None:
            orders.append((scene.groups[::-1], INVERSE[scene.relation]))
        return any(self.relation in (None, relation) and self.fits(groups) for groups, relation in orders)

    def fits(self, groups: tuple[Group, ...]) -> bool:
        return len(groups) == len(self.groups) and all(
            said.items() <= vars(group).items() for said, group in zip(self.groups, groups, strict=True)
        )


def key_of(words, text, pattern):
    """The key one of whose words matches, the longest first; None if none does."""
    by_length = sorted(((word, key) for key, some in words.items() for word in some), key=lambda pair: -len(pair[0]))
    return next((key for word, key in by_length if re.search(pattern.format(word), text)), None)


def parse(caption: str) -> Claim:
    assert re.fullmatch(r"[a-z ]+", caption)
    body, background = re.fullmatch(r"(.*?)(?: (?:on|against) a (\w+) background)?", caption).groups()
    body = re.sub(r"^(a picture of|an image showing|a drawing with|here we see) ", "", body)
    relation = key_of(RELATION_WORDS, body, r"\b{}\b")
    links = RELATION_WORDS[relation] if relation else ("and", "together with")
    longest_first = "|".join(sorted(links, key=len, reverse=True))
    groups = []
    for part in re.split(rf" (?:is |are )?(?:{longest_first}) ", body):
        said = {
            "count": key_of(COUNT_WORDS, re.sub("^an ", "a ", part), "^{} "),
            "size": key_of(SIZE_WORDS, part, r"\b{}\b"),
            "colour": key_of(COLOUR_WORDS, part, r"\b{}\b"),
            "shape": key_of(SHAPES, part, r"\b{}(s|es)?$"),
        }
        assert (said["count"] == 1) == part.endswith(SINGULARS), caption
        groups.append({key: value for key, value in said.items() if value is not None})
    return Claim(groups, relation, background)


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(0, {"train": 400, "val": 300, "test": 300})


def test_every_caption_is_true_and_the_full_ones_of_no_other_scene(scenes):
    for split in ("val", "test"):
        for i, scene in enumerate(scenes[split]):
            captions = describe(scene, Random(i))
            assert len(set(captions)) == 5
            claims = [parse(caption) for caption in captions]
            assert all(claim.is_true_of(scene) for claim in claims), captions
            for claim in claims[:2]:
                assert [j for j, other in enumerate(scenes[split]) if claim.is_true_of(other)] == [i], captions


def test_no_scene_twice_in_all_splits(scenes):
    everything = [scene.canonical() for split in scenes.values() for scene in split]
    assert len(set(everything)) == len(everything)
    assert all(scene.is_drawable() for scene in everything)


def test_scenes_have_near_duplicates(scenes):
    def facts(scene):
        return [scene.background, scene.relation, *(v for g in scene.groups for v in vars(g).values())]

    for first in range(0, 300, 4):
        base, *others = scenes["test"][first : first + 4]
        for other in others:
            assert sum(a != b for a, b in zip(facts(base), facts(other), strict=True)) == 1


def test_scenes_cover_the_vocabulary(scenes):
    groups = [group for scene in scenes["train"] for group in scene.groups]
    assert {g.shape for g in groups} == set(SHAPES)
    assert {g.colour for g in groups} == set(COLOURS)
    assert {g.count for g in groups} == {1, 2, 3, 4}
    assert {scene.relation for scene in scenes["train"]} == {None, *INVERSE}
    assert {scene.background for scene in scenes["train"]} == set(BACKGROUNDS)


def places_of(pixels, colour):
    distance = np.abs(pixels.astype(int) - np.array(COLOURS[colour])).max(axis=-1)
    return np.argwhere(distance <= 10)


@pytest.mark.parametrize("relation", ["left", "right", "above", "below", "inside"])
@pytest.mark.parametrize("seed", range(10))
def test_pictures_show_the_relation(relation, seed):
    first, second = Group(1, "small", "red", "star"), Group(1, "large", "blue", "square")
    pixels = np.asarray(render(Scene("white", (first, second), relation), 64, Random(seed)))
    red, blue = places_of(pixels, "red"), places_of(pixels, "blue")
    assert len(red) > 5
    assert len(blue) > 100
    (y1, x1), (y2, x2) = red.mean(axis=0), blue.mean(axis=0)
    if relation == "inside":
        assert (red.min(axis=0) > blue.min(axis=0)).all()
        assert (red.max(axis=0) < blue.max(axis=0)).all()
        return
    dx, dy = x2 - x1, y2 - y1
    assert {"left": dx, "right": -dx, "above": dy, "below": -dy}[relation] > 0
    assert (abs(dx) > abs(dy)) == (relation in ("left", "right"))


def test_pictures_show_count_and_size():
    for seed in range(10):
        areas = {}
        for size in ("small", "large"):
            for count in (1, 4):
                scene = Scene("grey", (Group(count, size, "red", "circle"),))
                areas[size, count] = len(places_of(np.asarray(render(scene, 64, Random(seed))), "red"))
        assert areas["large", 1] > 2.5 * areas["small", 1]
        assert 2.5 < areas["large", 4] / areas["large", 1] < 5.5  # none is hidden or cut off


def test_same_seed_same_bytes_and_another_seed_others():
    first, again, other = (load_dataset("synthetic", seed=seed, size=SIZE) for seed in (3, 3, 4))
    for split in ("train", "val", "test"):
        a, b, c = (getattr(data, split) for data in (first, again, other))
        assert a.captions == b.captions != c.captions
        np.testing.assert_array_equal(a.images.pixels, b.images.pixels)
    assert [len(first.train), len(first.val), len(first.test)] == list(SIZE)
    assert len(first.test.captions) == 5 * len(first.test)
    assert first.test.images[0].size == (64, 64)
    longer = load_dataset("synthetic", seed=3, size=(100, 24, 24))
    assert longer.test.captions == first.test.captions


@pytest.mark.parametrize("options", [{"size": (1, 0, 1)}, {"size": (1, 1)}, {"size": (10**6, 1, 1)}, {"image_size": 8}])
def test_bad_parameters(options):
    with pytest.raises(DataError, match=r"synthetic: .*got"):
        load_dataset("synthetic", **options)
