"""The miniature world: rendered 3D scenes with exact depth and masks.

Camera at the origin, x right, y up, z forward, focal length 1 image width; the ground is the plane y = -CAMERA_HEIGHT.
Objects float: image position, apparent size and depth are drawn independently, so depth must be *seen* (haze that
grows with depth, the cast shadow's place on the ground), not guessed from where or how large an object appears.

Shapes: S scenes, K object slots, P = SIZE * SIZE pixels.
"""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from ..targets.files import whole_file

SIZE = 64  # pixels
SLOTS = 5
GRID = 8  # patches a side
CAMERA_HEIGHT = 2.4  # metres above the ground
HORIZON = 0.3  # the horizon lies this share of the image below its top edge
NEAR, FAR, SKY = 3.5, 9.5, 20.0  # metres: range of object depths, and the depth written for the sky
HEIGHT = HORIZON + CAMERA_HEIGHT / FAR  # objects' centers lie in this upper part of the image
COLORS = {
    "red": (0.86, 0.10, 0.10),
    "blue": (0.12, 0.20, 0.88),
    "green": (0.08, 0.62, 0.14),
    "yellow": (0.90, 0.80, 0.10),
    "purple": (0.58, 0.12, 0.66),
    "cyan": (0.10, 0.72, 0.76),
}
REFERENTS = ("red", "blue", "green")  # every scene has one object of each: CV-Bench's colored boxes
SHAPES = ("ball", "cube", "cylinder", "cone")
CLASSES = ("sky", "floor", *COLORS)  # semantic classes of the masks


@dataclass
class Scenes:
    """Parameters of S scenes with K object slots; absent slots have ``color == -1``."""

    color: np.ndarray  # (S, K) index into COLORS
    shape: np.ndarray  # (S, K) index into SHAPES
    u: np.ndarray  # (S, K) image x of the center, in image widths, 0 in the middle
    v: np.ndarray  # (S, K) image y of the center above the horizon, in image widths
    z: np.ndarray  # (S, K) depth in meters
    r: np.ndarray  # (S, K) apparent radius in image widths
    yaw: np.ndarray  # (S, K) radians
    haze: np.ndarray  # (S, 4) haze color and density per meter
    floor: np.ndarray  # (S, 3)
    light: np.ndarray  # (S, 2) tilt of the shadow-casting light

    def __len__(self):
        return len(self.color)

    def __getitem__(self, index) -> "Scenes":
        return Scenes(**{name: value[index] for name, value in vars(self).items()})

    def position(self) -> np.ndarray:
        """World coordinates (S, K, 3) of the centers, in meters."""
        return np.stack([self.u * self.z, self.v * self.z, self.z], -1)


def save_scenes(path, scenes: Scenes, arrays: dict[str, np.ndarray]) -> None:
    """One safetensors file: the arrays under their names, the scenes' parameters as ``scene.<name>``."""
    parameters = {f"scene.{name}": np.ascontiguousarray(value) for name, value in vars(scenes).items()}
    with whole_file(path) as unfinished:
        save_file({**arrays, **parameters}, unfinished)


def load_scenes(path) -> tuple[Scenes, dict[str, np.ndarray]]:
    """What `save_scenes` wrote."""
    arrays = load_file(path)
    parameters = {name: arrays.pop(name) for name in list(arrays) if name.startswith("scene.")}
    return Scenes(**{name.removeprefix("scene."): value for name, value in parameters.items()}), arrays


def sample_scenes(count: int, seed: int) -> Scenes:
    """Draw ``count`` scenes of 3 to 5 objects; a shape's count is made uniform over 0..3 for one shape a scene."""
    rng = np.random.default_rng(seed)
    scenes = Scenes(
        *(np.zeros((count, SLOTS), dtype) for dtype in (int, int, float, float, float, float, float)),
        haze=np.concatenate([rng.uniform(0.55, 0.85, (count, 3)), rng.uniform(0.14, 0.22, (count, 1))], 1),
        floor=rng.uniform(0.25, 0.6, (count, 3)),
        light=rng.uniform(-0.12, 0.12, (count, 2)),
    )
    for i in range(count):
        n = rng.integers(3, SLOTS + 1)
        scenes.color[i] = [0, 1, 2, *rng.integers(3, len(COLORS), n - 3), *[-1] * (SLOTS - n)]
        wanted, copies = rng.integers(4), rng.integers(4)  # `copies` objects of shape `wanted`, the others differ
        shape = (wanted + rng.integers(1, 4, SLOTS)) % 4
        shape[rng.permutation(n)[:copies]] = wanted
        scenes.shape[i] = shape
        scenes.yaw[i] = rng.uniform(0, np.pi / 2, SLOTS)
        placed = False
        while not placed:  # image position, size and depth are independent; centers may not hide each other
            r = rng.uniform(0.075, 0.13, SLOTS)
            u = rng.uniform(-0.5 + r, 0.5 - r)
            v = rng.uniform(r - CAMERA_HEIGHT / FAR + 0.01, HORIZON - r)
            gap = np.hypot(u[:, None] - u, v[:, None] - v)[:n, :n] / (r[:, None] + r)[:n, :n]
            placed = gap[np.triu_indices(int(n), 1)].min() > 0.85
        scenes.r[i], scenes.u[i], scenes.v[i] = r, u, v
        scenes.z[i] = np.exp(rng.uniform(np.log(NEAR), np.log(FAR), SLOTS))
    return scenes


def _first_hit(candidates, valid):
    """Smallest positive t of several candidate hits (each (N, P)) where ``valid``; inf where there is none."""
    return np.min([np.where(ok & (t > 1e-3), t, np.inf) for t, ok in zip(candidates, valid, strict=True)], 0)


def _quadratic(a, b, c):
    """Both roots of a t^2 + 2 b t + c, and where they are real."""
    disc = b * b - a * c
    root = np.sqrt(np.maximum(disc, 0))
    a = np.where(np.abs(a) < 1e-9, 1e-9, a)
    return (-b - root) / a, (-b + root) / a, disc >= 0


def _intersect(shape: int, o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rays o + t d, (N, P, 3) in an object's own coordinates, against a unit shape: t (N, P) and normals (N, P, 3)."""
    (ox, oy, oz), (dx, dy, dz) = np.moveaxis(o, -1, 0), np.moveaxis(d, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        if SHAPES[shape] == "ball":
            t0, t1, real = _quadratic((d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - 1)
            t = _first_hit([t0, t1], [real, real])
            normal = o + np.where(np.isfinite(t), t, 0)[..., None] * d
        elif SHAPES[shape] == "cube":
            half = 0.8
            t0, t1 = (-half - o) / d, (half - o) / d
            near, far = np.minimum(t0, t1), np.maximum(t0, t1)
            t = np.where((near.max(-1) < far.min(-1)) & (near.max(-1) > 1e-3), near.max(-1), np.inf)
            normal = -np.sign(d) * (near == near.max(-1, keepdims=True))
        else:
            cone = SHAPES[shape] == "cone"
            half, radius = 0.9, 0.95 if cone else 0.8
            k = radius / (2 * half) if cone else 0.0  # the radius shrinks by k a unit of height
            r0, slope = (k * (half - oy), -k * dy) if cone else (radius, 0.0)
            a, b, c = dx * dx + dz * dz - slope**2, ox * dx + oz * dz - r0 * slope, ox * ox + oz * oz - r0 * r0
            t0, t1, real = _quadratic(a, b, c)
            sides = [(t, real & (np.abs(oy + t * dy) <= half)) for t in (t0, t1)]
            caps = [((y - oy) / dy, y) for y in ((-half,) if cone else (-half, half))]
            caps = [(t, (ox + t * dx) ** 2 + (oz + t * dz) ** 2 <= radius**2) for t, _ in caps]
            t = _first_hit(*zip(*sides, *caps, strict=True))
            on_cap = np.any([t == cap for cap, _ in caps], 0)
            hit = o + np.where(np.isfinite(t), t, 0)[..., None] * d
            side_y = k * np.hypot(hit[..., 0], hit[..., 2])
            normal = np.stack([hit[..., 0], side_y, hit[..., 2]], -1)
            normal = np.where(on_cap[..., None], -np.sign(dy)[..., None] * [0, 1, 0], normal)
    return t, normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-9)


def _cast(scenes: Scenes, origin: np.ndarray, direction: np.ndarray):
    """First object hit by each ray (S, P, 3): t (S, P), slot (S, P; -1 for none), world normal (S, P, 3)."""
    best = np.full(direction.shape[:2], np.inf, np.float32)
    slot, normals = np.full(best.shape, -1), np.zeros_like(direction)
    center, radius = scenes.position(), scenes.r * scenes.z
    cos, sin = np.cos(scenes.yaw), np.sin(scenes.yaw)
    for k in range(SLOTS):
        for shape in range(len(SHAPES)):
            index = np.flatnonzero((scenes.color[:, k] >= 0) & (scenes.shape[:, k] == shape))
            if not len(index):
                continue
            c, s, scale = (x[index, k, None, None].astype(np.float32) for x in (cos, sin, radius))

            def turn(points, c=c, s=s):
                x, y, z = np.split(points, 3, -1)
                return np.concatenate([c * x - s * z, y, s * x + c * z], -1)

            o = turn(origin[index] - center[index, k, None].astype(np.float32)) / scale
            t, normal = _intersect(shape, np.broadcast_to(o, direction[index].shape), turn(direction[index]) / scale)
            closer = t < best[index]
            best[index] = np.where(closer, t, best[index])
            slot[index] = np.where(closer, k, slot[index])
            normals[index] = np.where(closer[..., None], turn(normal, c, -s), normals[index])
    return best, slot, normals


def render_scenes(scenes: Scenes, seed: int = 0) -> dict[str, np.ndarray]:
    """Ray-cast scenes: ``image`` (S, H, W, 3) uint8, ``depth`` (S, H, W) fp32 metres (SKY for the sky), ``mask``
    (S, H, W) uint8 class ids, ``visible`` (S, K) pixels of each object that can be seen."""
    rng, count = np.random.default_rng(seed), len(scenes)
    grid = (np.arange(SIZE) + 0.5) / SIZE
    direction = np.stack(np.broadcast_arrays(grid[None] - 0.5, HORIZON - grid[:, None], 1.0), -1)
    direction = np.broadcast_to(direction.reshape(1, -1, 3), (count, SIZE * SIZE, 3)).astype(np.float32)
    t, slot, normal = _cast(scenes, np.zeros((count, 1, 3), np.float32), direction)

    with np.errstate(divide="ignore"):
        t_floor = np.where(direction[..., 1] < 0, -CAMERA_HEIGHT / direction[..., 1], np.inf)
    is_floor = (slot < 0) & (t_floor < SKY)
    point = direction * np.where(is_floor, t_floor, 0)[..., None]
    up = np.concatenate([scenes.light[:, :1], np.ones((count, 1)), scenes.light[:, 1:]], 1).astype(np.float32)
    shadow = _cast(scenes, point, np.broadcast_to(up[:, None], point.shape))[1] >= 0

    checker = (np.floor(point[..., 0]) + np.floor(point[..., 2])) % 2
    floor = scenes.floor[:, None] * (0.85 + 0.3 * checker[..., None]) * np.where(shadow, 0.35, 1.0)[..., None]
    sun = np.array([-0.45, 0.75, -0.5]) / np.linalg.norm([-0.45, 0.75, -0.5])
    albedo = np.array(list(COLORS.values()))[np.maximum(np.take_along_axis(scenes.color, np.maximum(slot, 0), 1), 0)]
    lit = albedo * (0.5 + 0.5 * np.maximum(normal @ sun, 0))[..., None]
    depth = np.where(slot >= 0, t, np.where(is_floor, t_floor, SKY))
    clear = np.exp(-scenes.haze[:, 3:] * (depth - 2.5))[..., None] * (depth < SKY)[..., None]
    color = np.where((slot >= 0)[..., None], lit, floor)
    image = clear * color + (1 - clear) * scenes.haze[:, None, :3] + rng.normal(0, 0.012, color.shape)

    colors = np.take_along_axis(scenes.color, np.maximum(slot, 0), 1)
    mask = np.where(slot >= 0, 2 + colors, np.where(is_floor, 1, 0))
    square = (count, SIZE, SIZE)
    return {
        "image": (255 * np.clip(image, 0, 1)).round().astype(np.uint8).reshape(*square, 3),
        "depth": depth.astype(np.float32).reshape(square),
        "mask": mask.astype(np.uint8).reshape(square),
        "visible": (slot[..., None] == np.arange(SLOTS)).sum(1),
    }


def make_scenes(count: int, seed: int, desc: str = "rendering") -> tuple[Scenes, dict]:
    """``count`` scenes whose objects can all be seen (at least 12 pixels each), with their rendered arrays."""
    scenes = sample_scenes(int(count * 1.15) + 8, seed)
    starts = range(0, len(scenes), 32)
    with ProcessPoolExecutor(2) as pool:
        chunks, seeds = [scenes[i : i + 32] for i in starts], [seed * 1_000_003 + i for i in starts]
        parts = list(tqdm(pool.map(render_scenes, chunks, seeds), desc=desc, total=len(starts), unit="batch"))
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    keep = np.flatnonzero(((arrays["visible"] >= 12) | (scenes.color < 0)).all(1))[:count]
    if len(keep) < count:
        raise ValueError(f"only {len(keep)} of {count} scenes show all their objects; draw more scenes")
    return scenes[keep], {name: value[keep] for name, value in arrays.items()}
