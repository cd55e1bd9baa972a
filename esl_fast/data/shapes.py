"""Scenes of coloured shapes: what is in one, what it looks like, and what can be said about it."""

from dataclasses import dataclass
from functools import cache
from math import cos, pi, sin
from random import Random

from PIL import Image, ImageDraw

SHAPES = {
    "circle": ("circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star",),
    "diamond": ("diamond", "rhombus"),
    "cross": ("cross", "plus sign"),
    "heart": ("heart",),
    "ring": ("ring", "hoop"),
}
COLOURS = {
    "red": (215, 25, 30),
    "orange": (255, 135, 10),
    "yellow": (245, 220, 20),
    "green": (20, 135, 45),
    "cyan": (40, 205, 225),
    "blue": (25, 60, 205),
    "purple": (125, 35, 160),
    "pink": (255, 130, 190),
    "brown": (115, 65, 25),
}
COLOUR_WORDS = {name: (name,) for name in COLOURS} | {"purple": ("purple", "violet"), "cyan": ("cyan", "turquoise")}
SIZES = {"small": 0.068, "large": 0.135}  # radius in image sides
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
COUNT_WORDS = {1: ("a", "one"), 2: ("two", "a pair of"), 3: ("three",), 4: ("four",)}
BACKGROUNDS = {
    "white": (248, 248, 248),
    "grey": (150, 150, 150),
    "black": (15, 15, 15),
    "beige": (232, 216, 184),
    "striped": (205, 205, 205),
    "checkered": (205, 205, 205),
}
RELATIONS = ("left", "right", "above", "below", "inside")
INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above", "inside": "around"}
RELATION_WORDS = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
    "inside": ("inside", "within"),
    "around": ("around", "surrounding"),
}
CONTAINERS = ("circle", "square")
SUPERSAMPLING = 4

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Group:
    """`count` shapes of one kind."""

    count: int
    size: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """One group, or two of which the first lies `relation` of the second."""

    background: str
    groups: tuple[Group, ...]
    relation: str | None = None

    def is_drawable(self) -> bool:
        """Whether the shapes fit, and neither group can be mistaken for the other or be counted with it."""
        if len(self.groups) == 1:
            return True
        first, second = self.groups
        if first.count + second.count > 4 or (first.colour, first.shape) == (second.colour, second.shape):
            return False
        if self.relation != "inside":
            return True
        return (
            (first.count, first.size) == (1, "small")
            and (second.count, second.size) == (1, "large")
            and second.shape in CONTAINERS
            and first.colour != second.colour
        )

    def canonical(self) -> "Scene":
        """The same for all wordings of a scene: A right of B is B left of A."""
        if self.relation in ("right", "below"):
            return Scene(self.background, self.groups[::-1], INVERSE[self.relation])
        return self


@cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape of radius 1 (y points down)."""
    if shape == "square":
        return ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85))
    if shape == "triangle":
        return ((0.0, -1.0), (1.0, 0.85), (-1.0, 0.85))
    if shape == "diamond":
        return ((0.0, -1.1), (0.65, 0.0), (0.0, 1.1), (-0.65, 0.0))
    if shape == "star":
        return tuple(((1.1, 0.45)[i % 2] * sin(i * pi / 5), -(1.1, 0.45)[i % 2] * cos(i * pi / 5)) for i in range(10))
    if shape == "cross":
        arm, end = 0.32, 1.0
        quarter = ((arm, -end), (arm, -arm), (end, -arm))
        return tuple(
            (x * c - y * s, x * s + y * c) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1)) for x, y in quarter
        )
    angles = [i * pi / 16 for i in range(32)]  # heart
    return tuple(
        (sin(t) ** 3, -(13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) / 16 - 0.1) for t in angles
    )


def _cut(box: Box, fraction: float, sideways: bool) -> tuple[Box, Box]:
    left, top, right, bottom = box
    if sideways:
        middle = left + (right - left) * fraction
        return (left, top, middle, bottom), (middle, top, right, bottom)
    middle = top + (bottom - top) * fraction
    return (left, top, right, middle), (left, middle, right, bottom)


def _slots(box: Box, count: int, rng: Random) -> list[Box]:
    """Cut `box` into `count` parts, each wide enough for a large shape."""
    if count == 1:
        return [box]
    first = rng.choice((count // 2, count - count // 2))
    width, height = box[2] - box[0], box[3] - box[1]
    halves = _cut(box, first / count, width > height or (width == height and rng.random() < 0.5))
    return _slots(halves[0], first, rng) + _slots(halves[1], count - first, rng)


def _background(scene: Scene, side: int, rng: Random) -> Image.Image:
    shift = rng.randint(-6, 6)
    canvas = Image.new("RGB", (side, side), tuple(channel + shift for channel in BACKGROUNDS[scene.background]))
    if scene.background not in ("striped", "checkered"):
        return canvas
    draw = ImageDraw.Draw(canvas)
    cell = side // 8
    start_x, start_y = -rng.randrange(2 * cell), -rng.randrange(2 * cell)
    upright = rng.random() < 0.5
    light = (238 + shift,) * 3
    for i in range(10):
        for j in range(10):
            if (i if upright else j) % 2 if scene.background == "striped" else (i + j) % 2:
                x, y = start_x + i * cell, start_y + j * cell
                draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=light)
    return canvas


@dataclass(frozen=True)
class _Placed:
    group: Group
    x: float
    y: float
    radius: float


def _place(scene: Scene, side: int, rng: Random) -> list[list[_Placed]]:
    """Places of the shapes of each group, such that `scene.relation` holds and no other does."""
    if scene.relation == "inside":
        inner, outer = scene.groups
        radius = SIZES[outer.size] * side
        x, y = (rng.uniform(1.2 * radius, side - 1.2 * radius) for _ in range(2))
        # the outer one comes first, or it would be drawn over the inner
        return [[_Placed(outer, x, y, radius)], [_Placed(inner, x, y, SIZES[inner.size] * side)]]
    whole = (0.0, 0.0, float(side), float(side))
    if scene.relation is None:
        return [_scatter(scene.groups[0], whole, side, rng)]
    sideways = scene.relation in ("left", "right")
    while True:
        parts = _cut(whole, rng.uniform(0.42, 0.58), sideways)
        parts = parts[::-1] if scene.relation in ("right", "below") else parts
        placed = [_scatter(group, part, side, rng) for group, part in zip(scene.groups, parts, strict=True)]
        (x1, y1), (x2, y2) = (_centre(shapes) for shapes in placed)
        along, across = (abs(x1 - x2), abs(y1 - y2)) if sideways else (abs(y1 - y2), abs(x1 - x2))
        if across < 0.7 * along:  # a diagonal could be called by either name
            return placed


def _scatter(group: Group, part: Box, side: int, rng: Random) -> list[_Placed]:
    placed = []
    for left, top, right, bottom in _slots(part, group.count, rng):
        radius = SIZES[group.size] * side * rng.uniform(0.94, 1.06)
        reach = 1.1 * radius  # of the longest shapes, star and diamond
        x, y = rng.uniform(left + reach, right - reach), rng.uniform(top + reach, bottom - reach)
        placed.append(_Placed(group, x, y, radius))
    return placed


def _centre(shapes: list[_Placed]) -> tuple[float, float]:
    return sum(shape.x for shape in shapes) / len(shapes), sum(shape.y for shape in shapes) / len(shapes)


def _draw_shape(draw: ImageDraw.ImageDraw, placed: _Placed, rng: Random) -> None:
    x, y, radius = placed.x, placed.y, placed.radius
    colour = tuple(max(0, min(255, channel + rng.randint(-8, 8))) for channel in COLOURS[placed.group.colour])
    corners = [round(x - radius), round(y - radius), round(x + radius), round(y + radius)]
    if placed.group.shape == "circle":
        draw.ellipse(corners, fill=colour)
    elif placed.group.shape == "ring":
        draw.ellipse(corners, outline=colour, width=round(0.38 * radius))
    else:
        angle = rng.uniform(-0.15, 0.15)
        c, s = cos(angle) * radius, sin(angle) * radius
        outline = _outline(placed.group.shape)
        draw.polygon([(round(x + u * c - v * s), round(y + u * s + v * c)) for u, v in outline], fill=colour)


def render(scene: Scene, size: int, rng: Random) -> Image.Image:
    """Draw `scene` on `size` x `size` pixels; `rng` sets what it leaves open: places, angles, shades."""
    side = size * SUPERSAMPLING
    canvas = _background(scene, side, rng)
    draw = ImageDraw.Draw(canvas)
    for shapes in _place(scene, side, rng):
        for shape in shapes:
            _draw_shape(draw, shape, rng)
    return canvas.reduce(SUPERSAMPLING)


def _phrase(group: Group, rng: Random, size: bool = True, colour: bool = True, shape: bool = True) -> str:
    words = []
    if size:
        words.append(rng.choice(SIZE_WORDS[group.size]))
    if colour:
        words.append(rng.choice(COLOUR_WORDS[group.colour]))
    noun = rng.choice(SHAPES[group.shape] if shape else ("shape", "object"))
    if group.count > 1:
        noun += "es" if noun.endswith("s") else "s"
    words.append(noun)
    count = rng.choice(COUNT_WORDS[group.count])
    return " ".join(["an" if count == "a" and words[0][0] in "aeiou" else count, *words])


def _sentence(scene: Scene, phrases: list[str], rng: Random, relation: bool, background: bool, reverse: bool) -> str:
    opening = rng.choice(("", "a picture of ", "an image showing ", "a drawing with ", "here we see "))
    body = phrases[0]
    if len(phrases) == 2:
        first, second = phrases[::-1] if reverse else phrases
        link = rng.choice(("and", "together with"))
        if relation:
            name = INVERSE[scene.relation] if reverse else scene.relation
            link = rng.choice(RELATION_WORDS[name])
            if not opening:
                link = f"{'is' if scene.groups[reverse].count == 1 else 'are'} {link}"
        body = f"{first} {link} {second}"
    if background:
        body += f" {rng.choice(('on', 'against'))} a {scene.background} background"
    return opening + body


def describe(scene: Scene, rng: Random) -> list[str]:
    """Five different captions, all true of `scene`; the first two say everything, each of the others leaves
    something out: the background, the sizes, or all but one attribute of the shapes."""
    reverse = rng.random() < 0.5
    aspects = [
        ({}, True, True, reverse),
        ({}, True, True, not reverse),
        ({}, True, False, rng.random() < 0.5),
        ({"size": False}, True, rng.random() < 0.5, rng.random() < 0.5),
        (_telling_attribute(scene, rng), rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.5),
    ]
    captions: list[str] = []
    for shown, relation, background, reversed_ in aspects:
        text = None
        while text is None or text in captions:
            phrases = [_phrase(group, rng, **shown) for group in scene.groups]
            text = _sentence(scene, phrases, rng, relation, background, reversed_)
        captions.append(text)
    return captions


def _telling_attribute(scene: Scene, rng: Random) -> dict[str, bool]:
    """Show only colour or only shape, whichever still tells the two groups apart."""
    kept = [name for name in ("colour", "shape") if len({getattr(g, name) for g in scene.groups}) == len(scene.groups)]
    chosen = rng.choice(kept)
    return {name: name == chosen for name in ("size", "colour", "shape")}


