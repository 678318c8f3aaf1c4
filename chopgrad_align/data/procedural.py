"""Captioned videos made by a formula: textured shapes that move over textured backgrounds.

They are the training data of the embedded pipeline and of its reward, and the videos of the tests: many thousands of
different captions, exact ground truth, no download. Everything is a function of its arguments and a seed.

A second generator, `texture_clip`, makes moving *dead leaves* (occluding textured discs over 1/f noise), whose
statistics are close to those of natural images (Lee, Mumford and Huang, "Occlusion Models for Natural Images", 2001).
A video autoencoder that sees only tidy shapes does not carry over to camera footage; one that also sees these does.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.12, 0.12),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.98, 0.90, 0.15),
    "green": (0.10, 0.65, 0.20),
    "cyan": (0.15, 0.85, 0.88),
    "blue": (0.12, 0.25, 0.90),
    "purple": (0.52, 0.15, 0.72),
    "pink": (0.98, 0.50, 0.75),
    "white": (0.97, 0.97, 0.97),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
SIZES = {"small": 0.34, "large": 0.58}
TEXTURES = ("plain", "striped", "checkered", "dotted")
MOTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "spinning",
    "growing",
    "shrinking",
    "bouncing",
    "standing still",
)
BACKGROUNDS = {
    "black": "on a black background",
    "grey": "on a grey background",
    "blue sky": "in a blue sky",
    "grass": "over green grass",
    "sand": "over yellow sand",
    "water": "over dark water",
    "bricks": "in front of a brick wall",
    "night": "in a starry night",
}
# Combinations in which the shape could hardly be seen.
_CAMOUFLAGE = {("green", "grass"), ("yellow", "sand"), ("cyan", "blue sky")}

_OUTLINE = 0.035  # width of the dark rim, in units of half the frame: separates a shape from a background like it


@dataclass(frozen=True)
class Scene:
    """The content of one caption."""

    colour: str
    shape: str
    size: str
    texture: str
    motion: str
    background: str

    @property
    def caption(self) -> str:
        texture = "" if self.texture == "plain" else f"{self.texture} "
        what = f"{self.size} {texture}{self.colour} {self.shape}"
        return f"a {what} {self.motion} {BACKGROUNDS[self.background]}"

    @property
    def held_out(self) -> bool:
        """True for a caption of the tenth that no model is trained on: a property of its text alone."""
        return zlib.crc32(self.caption.encode()) % 10 == 0


def all_scenes() -> list[Scene]:
    """Every scene that there is, in a fixed order."""
    return [
        Scene(colour, shape, size, texture, motion, background)
        for colour in COLOURS
        for shape in SHAPES
        for size in SIZES
        for texture in TEXTURES
        for motion in MOTIONS
        for background in BACKGROUNDS
        if (colour, background) not in _CAMOUFLAGE
    ]


def random_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """A scene drawn uniformly from the training captions, or from the held-out ones."""
    while True:
        scene = Scene(
            rng.choice(list(COLOURS)),
            rng.choice(SHAPES),
            rng.choice(list(SIZES)),
            rng.choice(TEXTURES),
            rng.choice(MOTIONS),
            rng.choice(list(BACKGROUNDS)),
        )
        if (scene.colour, scene.background) not in _CAMOUFLAGE and scene.held_out == held_out:
            return scene


def render(
    scene: Scene, seed: int, frames: int = 17, size: int = 64, only: slice = slice(None), spread: float = 1.0
) -> Tensor:
    """Draw a scene; the seed decides what the caption leaves open (place, speed, phase, shades).

    Args:
        only: Which of the frames to draw.
        spread: How far the shape's place, pose, size and speed vary from seed to seed; 0: not at all.

    Returns:
        float32 video `(3, frames drawn, size, size)` in [0, 1].
    """
    background, painted, inside = layers(scene, seed, frames, size, only, spread)
    return (painted * inside + background * (1 - inside)).clamp(0, 1)


def layers(
    scene: Scene, seed: int, frames: int = 17, size: int = 64, only: slice = slice(None), spread: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The layers that `render` puts together.

    Returns:
        The background and the painted shape, `(3, frames drawn, size, size)`, and how much of each pixel the shape
        covers, `(1, frames drawn, size, size)`.
    """
    rng = random.Random(seed)
    time = torch.linspace(0, 1, frames)[only].view(-1, 1, 1)
    frames = len(time)
    axis = (torch.arange(size, dtype=torch.float32) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    background = _BACKGROUND_PAINTERS[scene.background](x, y, time, rng).expand(3, frames, size, size)

    centre_x, centre_y, angle, scale = _trajectory(scene, time, rng, spread)
    radius = SIZES[scene.size] * (1 + 0.08 * spread * rng.uniform(-1, 1)) * scale
    dx, dy = (x - centre_x) / radius, (y - centre_y) / radius
    cos, sin = torch.cos(angle), torch.sin(angle)
    u, v = cos * dx + sin * dy, cos * dy - sin * dx  # the shape's own frame: unit radius, v pointing down
    distance = _SHAPE_DISTANCES[scene.shape](u, v) * radius

    softness = 2.0 / size
    inside = torch.sigmoid(-distance / softness * 2)
    core = torch.sigmoid(-(distance + _OUTLINE) / softness * 2)
    colour = torch.tensor(COLOURS[scene.colour]).view(3, 1, 1, 1) * rng.uniform(0.92, 1.0)
    fill = colour * _TEXTURE_SHADES[scene.texture](u * radius, v * radius)
    return background, fill * core + 0.06 * (1 - core), inside[None]


def _trajectory(scene: Scene, time: Tensor, rng: random.Random, spread: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre x, centre y, rotation angle (radians) and scale of the shape in every frame; each `(frames, 1, 1)`."""

    def around(middle: float, reach: float) -> float:
        return middle + spread * reach * rng.uniform(-1, 1)

    zero, one = torch.zeros_like(time), torch.ones_like(time)
    x0, y0 = around(0, 0.3), around(0, 0.3)
    angle = zero + around(0, 0.2)
    travel = around(1.05, 0.15) * (time - 0.5)
    match scene.motion:
        case "moving left":
            return -travel, y0 + zero, angle, one
        case "moving right":
            return travel, y0 + zero, angle, one
        case "moving up":
            return x0 + zero, -travel, angle, one
        case "moving down":
            return x0 + zero, travel, angle, one
        case "spinning":
            turn = rng.choice((-1, 1)) * around(3.25, 0.75) * time
            return x0 + zero, y0 + zero, angle + turn, one
        case "growing":
            return x0 + zero, y0 + zero, angle, 0.55 + 0.65 * time
        case "shrinking":
            return x0 + zero, y0 + zero, angle, 1.2 - 0.65 * time
        case "bouncing":
            height = torch.sin(math.pi * ((2.0 * time + around(0.5, 0.5)) % 1.0))
            return x0 + zero, 0.45 - 0.8 * height, angle, one
        case "standing still":
            return x0 + zero, y0 + zero, angle, one
    raise ValueError(f"unknown motion {scene.motion!r}; expected one of {', '.join(MOTIONS)}")


# Signed distances in the shape's own frame (negative inside); exact or close to it near the edge.


def _polygon(u: Tensor, v: Tensor, corners: list[tuple[float, float]]) -> Tensor:
    nearest = torch.full_like(u, math.inf)
    sign = torch.ones_like(u)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        wx, wy = u - ax, v - ay
        along = ((wx * ex + wy * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        nearest = torch.minimum(nearest, (wx - ex * along).square() + (wy - ey * along).square())
        upward, downward, left = v >= ay, v < by, ex * wy > ey * wx
        crosses = (upward & downward & left) | (~upward & ~downward & ~left)
        sign = torch.where(crosses, -sign, sign)
    return sign * nearest.sqrt()


def _regular(points: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """Corners of a regular polygon, or of a star when `inner` < 1, the first one pointing up."""
    if inner == 1.0:
        turns = [i / points for i in range(points)]
        return [(math.sin(2 * math.pi * t), -math.cos(2 * math.pi * t)) for t in turns]
    return [
        (r * math.sin(math.pi * i / points), -r * math.cos(math.pi * i / points))
        for i, r in enumerate([1.0, inner] * points)
    ]


_CROSS_CORNERS = [(0.32, -1.0), (0.32, -0.32), (1.0, -0.32), (1.0, 0.32), (0.32, 0.32), (0.32, 1.0)]
_CROSS_CORNERS += [(-a, -b) for a, b in _CROSS_CORNERS]
_HEART_CORNERS = [
    (16 * math.sin(t) ** 3 / 16, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 15)
    for t in (2 * math.pi * i / 18 for i in range(18))
]
_SHAPE_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": lambda u, v: (u.square() + v.square()).sqrt() - 0.9,
    "ring": lambda u, v: ((u.square() + v.square()).sqrt() - 0.72).abs() - 0.24,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) - 0.8,
    "diamond": lambda u, v: (u.abs() * 1.5 + v.abs() - 1.1) / math.hypot(1.5, 1.0),
    "triangle": lambda u, v: _polygon(u, v, _regular(3)),
    "star": lambda u, v: _polygon(u, v, _regular(5, inner=0.42)),
    "cross": lambda u, v: _polygon(u, v, _CROSS_CORNERS),
    "heart": lambda u, v: _polygon(u, v, _HEART_CORNERS),
}


# Fill patterns: a factor on the colour, in the shape's own frame, in units of half the frame.


def _bands(coordinate: Tensor, period: float) -> Tensor:
    return torch.sigmoid(6 * torch.sin(2 * math.pi * coordinate / period))


_TEXTURE_SHADES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": lambda u, v: torch.ones_like(u),
    "striped": lambda u, v: 1 - 0.6 * _bands(u + v, 0.36),
    "checkered": lambda u, v: 0.7 + 0.3 * (2 * _bands(u, 0.4) - 1) * (2 * _bands(v, 0.4) - 1),
    "dotted": lambda u, v: (
        1 - 0.65 * torch.sigmoid(8 * (torch.cos(2 * math.pi * u / 0.3) + torch.cos(2 * math.pi * v / 0.3) - 0.8))
    ),
}


def _tint(rgb: tuple[float, float, float], rng: random.Random) -> Tensor:
    return torch.tensor(rgb).view(3, 1, 1, 1) * rng.uniform(0.88, 1.08)


def _noise(x: Tensor, rng: random.Random, exponent: float) -> Tensor:
    """A random field with power spectrum 1/f^(2 exponent), unit variance, as large as the frame."""
    height, width = x.shape[-2:]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    spectrum = torch.fft.rfft2(torch.randn(height, width, generator=generator))
    fy, fx = torch.fft.fftfreq(height).view(-1, 1), torch.fft.rfftfreq(width).view(1, -1)
    radius = (fy.square() + fx.square()).sqrt().clamp(min=1 / max(height, width))
    field = torch.fft.irfft2(spectrum * radius**-exponent, s=(height, width))
    field = field - field.mean()
    return field / field.std()


def _plain(rgb: tuple[float, float, float]) -> Callable[..., Tensor]:
    return lambda x, y, time, rng: _tint(rgb, rng) * (1 + 0.12 * rng.uniform(-1, 1) * y)


def _grass(x: Tensor, y: Tensor, time: Tensor, rng: random.Random) -> Tensor:
    return _tint((0.22, 0.50, 0.14), rng) * (1 + 0.16 * _noise(x, rng, 1.5))


def _sand(x: Tensor, y: Tensor, time: Tensor, rng: random.Random) -> Tensor:
    ripples = torch.sin(9 * y + 2.5 * _noise(x, rng, 1.6) + rng.uniform(0, 6))
    return _tint((0.86, 0.74, 0.46), rng) * (1 + 0.1 * ripples)


def _water(x: Tensor, y: Tensor, time: Tensor, rng: random.Random) -> Tensor:
    speed, phase = rng.choice((-1, 1)) * rng.uniform(3, 5), rng.uniform(0, 6)
    waves = torch.sin(10 * y + 2.2 * torch.sin(3 * x + phase) + speed * time)
    waves = waves + 0.5 * torch.sin(7 * x + 4 * y - speed * time + phase)
    return _tint((0.06, 0.26, 0.42), rng) * (1 + 0.32 * waves)


def _sky(x: Tensor, y: Tensor, time: Tensor, rng: random.Random) -> Tensor:
    clouds = torch.sigmoid(2.2 * _noise(x, rng, 1.7) - 1.6)
    return torch.lerp(_tint((0.42, 0.68, 0.94), rng) * (1 + 0.1 * y), torch.ones(3, 1, 1, 1) * 0.95, clouds)


def _bricks(x: Tensor, y: Tensor, time: Tensor, rng: random.Random) -> Tensor:
    rows = (y + rng.uniform(0, 1)) / 0.4
    columns = (x + rng.uniform(0, 1)) / 0.8 + 0.5 * (torch.floor(rows) % 2)
    mortar = torch.sigmoid(24 * torch.maximum((rows % 1 - 0.5).abs() - 0.41, ((columns % 1 - 0.5).abs() - 0.455) * 2))
    shade = 1 + 0.16 * torch.sin(12.9898 * torch.floor(rows) + 78.233 * torch.floor(columns) + rng.uniform(0, 6))
    brick = _tint((0.56, 0.27, 0.20), rng) * shade
    return torch.lerp(brick, torch.full((3, 1, 1, 1), 0.72), mortar.expand(3, 1, *x.shape))


def _night(x: Tensor, y: Tensor, time: Tensor, rng: random.Random) -> Tensor:
    sky = _tint((0.05, 0.05, 0.16), rng).expand(3, 1, *x.shape)
    for _ in range(rng.randint(9, 14)):
        px, py, reach = rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(0.045, 0.07)
        sky = sky + 0.85 * torch.exp(-((x - px).square() + (y - py).square()) / reach**2)
    return sky


_BACKGROUND_PAINTERS: dict[str, Callable[..., Tensor]] = {
    "black": _plain((0.04, 0.04, 0.04)),
    "grey": _plain((0.5, 0.5, 0.5)),
    "blue sky": _sky,
    "grass": _grass,
    "sand": _sand,
    "water": _water,
    "bricks": _bricks,
    "night": _night,
}


def texture_clip(seed: int, frames: int = 17, size: int = 64) -> Tensor:
    """A moving dead-leaves clip without a caption: float32 `(3, frames, size, size)` in [0, 1]."""
    rng = random.Random(seed)
    extent = 2 * size
    axis = torch.linspace(-1, 1, extent)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    canvas = _leaf_paint(x, rng)
    for _ in range(rng.randint(4, 40)):
        leaf = _leaf_mask(x, y, rng, smallest=0.05, largest=0.6)
        canvas = torch.lerp(canvas, _leaf_paint(x, rng), leaf)
    video = _camera(canvas, frames, size, rng, reach=0.35)
    for _ in range(rng.randint(0, 3)):  # a few leaves in front, each with a motion of its own
        mask = _leaf_mask(x, y, rng, smallest=0.1, largest=0.3)
        layer = _camera(torch.cat([_leaf_paint(x, rng), mask[None]]), frames, size, rng, reach=0.5)
        video = torch.lerp(video, layer[:3], layer[3:])
    gain, lift = rng.uniform(0.6, 1.1), rng.uniform(-0.1, 0.1)
    return ((video - 0.5) * gain + 0.5 + lift).clamp(0, 1)


def _leaf_paint(x: Tensor, rng: random.Random) -> Tensor:
    """A colour, modulated by luminance noise of a random roughness and a little colour noise: `(3, H, W)`."""
    base = torch.tensor([rng.random() for _ in range(3)]).view(3, 1, 1)
    base = torch.lerp(base.mean().expand(3, 1, 1), base, rng.uniform(0.1, 1.0))
    strength = 0.2 * rng.random() ** 1.5
    return base + strength * _noise(x, rng, rng.uniform(0.8, 2.0)) + torch.zeros(3, *x.shape)


def _leaf_mask(x: Tensor, y: Tensor, rng: random.Random, smallest: float, largest: float) -> Tensor:
    # Radii follow r^-3 between the bounds: the law under which dead leaves are scale invariant.
    radius = (rng.random() * (largest**-2 - smallest**-2) + smallest**-2) ** -0.5
    angle, aspect, corner = rng.uniform(0, math.pi), rng.uniform(1, 3), rng.choice((1.0, 2.0, 8.0))
    dx, dy = x - rng.uniform(-1, 1), y - rng.uniform(-1, 1)
    u = (math.cos(angle) * dx + math.sin(angle) * dy).abs() / radius
    v = (math.cos(angle) * dy - math.sin(angle) * dx).abs() / radius * aspect
    distance = (u**corner + v**corner) ** (1 / corner) - 1
    return torch.sigmoid(-distance * radius * x.shape[-1] * rng.choice((0.7, 2.0)))


def _camera(layer: Tensor, frames: int, size: int, rng: random.Random, reach: float) -> Tensor:
    """Film a still layer `(C, H, W)` with a smoothly moving camera: `(C, frames, size, size)`."""
    time = torch.linspace(-1, 1, frames)
    speed = rng.random() ** 2  # most motion is slow
    angle = rng.uniform(-3.2, 3.2) + speed * rng.uniform(-0.5, 0.5) * time
    zoom = 0.5 * torch.exp(speed * rng.uniform(-0.4, 0.4) * time)
    shake = 0.02 * speed * torch.sin(rng.uniform(2, 8) * time)
    pan_x, pan_y = (speed * rng.uniform(-reach, reach) * time + rng.uniform(-0.2, 0.2) for _ in range(2))
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    theta = torch.stack([torch.stack([cos, -sin, pan_x + shake], 1), torch.stack([sin, cos, pan_y - shake], 1)], 1)
    grid = F.affine_grid(theta, [frames, layer.shape[0], size, size], align_corners=False)
    film = F.grid_sample(layer[None].expand(frames, -1, -1, -1), grid, padding_mode="reflection", align_corners=False)
    return film.transpose(0, 1)
