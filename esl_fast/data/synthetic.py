"""A data set drawn by the program itself: no download, and hard enough that matching takes every attribute."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

import numpy as np
from PIL import Image
from tqdm import tqdm

from esl_fast.data.shapes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, Group, Scene, describe, render
from esl_fast.data.split import DataError, DataSet, Split

FAMILY = 4
MAX_IMAGES = 200_000
# test first, so that its pictures do not depend on the sizes of the others
DRAWING_ORDER = ("test", "val", "train")


class PixelArray:
    """Pictures held in memory as uint8 (N, H, W, 3)."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


def load_synthetic(
    *,
    seed: int = 0,
    size: Sequence[int] = (4000, 500, 500),
    image_size: int = 64,
) -> DataSet:
    """Scenes of one to four coloured shapes with five captions each.

    Scenes come in families that differ in one attribute, and no scene is in the data set twice: the full
    descriptions of an image (its first two captions) are true of no other.

    Args:
        seed: the same seed gives the same pictures and captions.
        size: number of images of train, val and test.
        image_size: side of a picture in pixels, at least 32.
    """
    if len(size) != 3 or min(size) < 1 or sum(size) > MAX_IMAGES:
        raise DataError(f"synthetic: size must be (train, val, test), each >= 1, in all <= {MAX_IMAGES}; got {size}")
    if image_size < 32:
        raise DataError(f"synthetic: image_size must be at least 32 pixels, got {image_size}")
    counts = dict(zip(("train", "val", "test"), size, strict=True))
    arrays = _draw(seed, counts, image_size)
    return DataSet("synthetic", **{name: _split(name, arrays) for name in counts}, image_kind="pixels")


def sample_scenes(seed: int, counts: dict[str, int]) -> dict[str, list[Scene]]:
    """Different scenes for each split, in families of near-duplicates that lie next to one another."""
    seen: set[Scene] = set()
    scenes: dict[str, list[Scene]] = {}
    for name in DRAWING_ORDER:
        rng = Random(f"scenes {name} {seed}")
        drawn = scenes[name] = []
        while len(drawn) < counts[name]:
            candidates = (scene for scene in _candidates(drawn, rng) if scene.is_drawable())
            scene = next(scene for scene in candidates if scene.canonical() not in seen)
            seen.add(scene.canonical())
            drawn.append(scene)
    return scenes


def _candidates(drawn: list[Scene], rng: Random) -> Iterator[Scene]:
    """Variations of the first scene of the family; new scenes to begin one, or where no variation is left."""
    member = len(drawn) % FAMILY
    if member:
        for _ in range(100):
            yield _vary(drawn[-member], rng)
    while True:
        yield _random_scene(rng)


def _random_scene(rng: Random) -> Scene:
    groups = tuple(
        Group(rng.randint(1, 3), rng.choice(list(SIZES)), rng.choice(list(COLOURS)), rng.choice(list(SHAPES)))
        for _ in range(2)
    )
    background = rng.choice(list(BACKGROUNDS))
    if rng.random() < 0.2:
        return Scene(background, (replace(groups[0], count=rng.randint(1, 4)),))
    relation = rng.choice(RELATIONS)
    if relation == "inside":  # drawable with few groups: chance alone would hardly ever draw one
        groups = (replace(groups[0], count=1, size="small"), replace(groups[1], count=1, size="large"))
    return Scene(background, groups, relation)


def _vary(scene: Scene, rng: Random) -> Scene:
    """A copy with one attribute drawn anew (it may come out as it was)."""
    attribute = rng.choice(("background", "relation", "count", "size", "colour", "shape"))
    if attribute == "background":
        return replace(scene, background=rng.choice(list(BACKGROUNDS)))
    if attribute == "relation":
        return replace(scene, relation=scene.relation and rng.choice(RELATIONS))
    choices = {"count": (1, 2, 3), "size": list(SIZES), "colour": list(COLOURS), "shape": list(SHAPES)}
    groups = list(scene.groups)
    chosen = rng.randrange(len(groups))
    groups[chosen] = replace(groups[chosen], **{attribute: rng.choice(choices[attribute])})
    return replace(scene, groups=tuple(groups))


def _draw(seed: int, counts: dict[str, int], image_size: int) -> dict[str, np.ndarray]:
    scenes = sample_scenes(seed, counts)
    arrays = {}
    with tqdm(total=sum(counts.values()), desc="drawing", unit="image", disable=None) as progress:
        for name, drawn in scenes.items():
            rng = Random(f"pictures {name} {seed}")
            pixels = np.empty((len(drawn), image_size, image_size, 3), dtype=np.uint8)
            captions = []
            for i, scene in enumerate(drawn):
                pixels[i] = np.asarray(render(scene, image_size, rng))
                captions.append(describe(scene, rng))
                progress.update()
            arrays[f"{name}_images"], arrays[f"{name}_captions"] = pixels, np.array(captions)
    return arrays


def _split(name: str, arrays: dict[str, np.ndarray]) -> Split:
    images = PixelArray(arrays[f"{name}_images"])
    return Split.from_lists(
        name, images, arrays[f"{name}_captions"].tolist(), [f"{name}-{i:05d}" for i in range(len(images))]
    )
