"""The miniature world: rendered 3D scenes with exact depth and masks.

Camera at the origin, x right, y up, z forward, focal length 1 image width; the ground is the plane y = -CAMERA_HEIGHT.
Objects float: image position, apparent size and depth are drawn independently, so depth must be *seen* (haze that
grows with depth, the cast shadow's place on the ground), not guessed from where or how large an object appears.

Shapes: S scenes, K object slots, P = SIZE * SIZE pixels.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from ..files.writing import whole_file

SIZE = 64  # pixels
# Objects of a scene, at most. The first three slots are the referents'.
SLOTS = 5
GRID = 8  # patches a side
CAMERA_HEIGHT = 2.4  # meters above the ground
# The horizon lies this share of the image below its top edge.
HORIZON = 0.3
# Meters: the range of the objects' depths, and the depth that is written for the sky.
NEAR = 3.5
FAR = 9.5
SKY = 20.0
# The objects' centers lie in this upper part of the image.
HEIGHT = HORIZON + CAMERA_HEIGHT / FAR
# Of an object that counts as seen.
VISIBLE_PIXELS = 12
COLORS = {
    "red": (0.86, 0.10, 0.10),
    "blue": (0.12, 0.20, 0.88),
    "green": (0.08, 0.62, 0.14),
    "yellow": (0.90, 0.80, 0.10),
    "purple": (0.58, 0.12, 0.66),
    "cyan": (0.10, 0.72, 0.76),
}
# Every scene has one object of each; they stand for CV-Bench's colored boxes.
REFERENTS = ("red", "blue", "green")
SHAPES = ("ball", "cube", "cylinder", "cone")
# Semantic classes of the masks.
CLASSES = ("sky", "floor", *COLORS)


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
    scenes = Scenes(**{name.removeprefix("scene."): value for name, value in parameters.items()})
    return scenes, arrays


def sample_scenes(count: int, seed: int) -> Scenes:
    """Draw ``count`` scenes of 3 to 5 objects; a shape's count is made uniform over 0..3 for one shape a scene."""
    # The order of the draws belongs to the data: with another one a seed gives other scenes.
    rng = np.random.default_rng(seed)
    haze_color = rng.uniform(0.55, 0.85, (count, 3))
    haze_density = rng.uniform(0.14, 0.22, (count, 1))
    scenes = Scenes(
        color=np.zeros((count, SLOTS), int),
        shape=np.zeros((count, SLOTS), int),
        u=np.zeros((count, SLOTS)),
        v=np.zeros((count, SLOTS)),
        z=np.zeros((count, SLOTS)),
        r=np.zeros((count, SLOTS)),
        yaw=np.zeros((count, SLOTS)),
        haze=np.concatenate([haze_color, haze_density], axis=1),
        floor=rng.uniform(0.25, 0.6, (count, 3)),
        light=rng.uniform(-0.12, 0.12, (count, 2)),
    )
    for i in range(count):
        # The three referents, and up to two objects of the other colors, which may be of the same one.
        objects = int(rng.integers(3, SLOTS + 1))
        others = rng.integers(3, len(COLORS), objects - 3)
        absent = [-1] * (SLOTS - objects)
        scenes.color[i] = [0, 1, 2, *others, *absent]
        scenes.shape[i] = _sample_shapes(rng, objects)
        # A quarter turn is enough: after it a cube looks the same.
        scenes.yaw[i] = rng.uniform(0, np.pi / 2, SLOTS)
        u, v, r = _place(rng, objects)
        scenes.u[i] = u
        scenes.v[i] = v
        scenes.r[i] = r
        # A step of depth is a factor: it is drawn evenly in its logarithm.
        scenes.z[i] = np.exp(rng.uniform(np.log(NEAR), np.log(FAR), SLOTS))
    return scenes


def _sample_shapes(rng: np.random.Generator, objects: int) -> np.ndarray:
    """(K,) shapes of a scene: 0 to 3 objects of one shape, none of the others of it."""
    wanted = rng.integers(4)
    copies = rng.integers(4)
    # First every slot gets a shape other than `wanted`, then `copies` of the objects get that one.
    shape = (wanted + rng.integers(1, 4, SLOTS)) % 4
    shape[rng.permutation(objects)[:copies]] = wanted
    return shape


def _place(rng: np.random.Generator, objects: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """u, v, r (K,) of a scene: drawn independently, until no object's center hides another's."""
    pairs = np.triu_indices(objects, 1)
    # Rejection sampling: one pair too close, and all objects are drawn anew.
    while True:
        r = rng.uniform(0.075, 0.13, SLOTS)
        # The whole object lies between the image's left and right edges.
        u = rng.uniform(-0.5 + r, 0.5 - r)
        # Above the ground that lies farthest, and below the image's upper edge.
        v = rng.uniform(r - CAMERA_HEIGHT / FAR + 0.01, HORIZON - r)
        distance = np.hypot(u[:, None] - u, v[:, None] - v)
        # Distance of two centers over the sum of their radii: 1 where outlines touch, 0.85 where they overlap a bit.
        gap = distance[:objects, :objects] / (r[:, None] + r)[:objects, :objects]
        if gap[pairs].min() > 0.85:
            return u, v, r


def _first_hit(candidates: Sequence[np.ndarray], valid: Sequence[np.ndarray]) -> np.ndarray:
    """Smallest positive t of several candidate hits (each (N, P)) where ``valid``; inf where there is none."""
    # A ray that starts on a surface doesn't hit it again.
    hits = [np.where(ok & (t > 1e-3), t, np.inf) for t, ok in zip(candidates, valid, strict=True)]
    return np.min(hits, axis=0)


def _quadratic(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both roots of a t^2 + 2 b t + c, and where they are real."""
    discriminant = b * b - a * c
    root = np.sqrt(np.maximum(discriminant, 0))
    # a is 0 for a ray along a cylinder's axis; it is divided by.
    a = np.where(np.abs(a) < 1e-9, 1e-9, a)
    return (-b - root) / a, (-b + root) / a, discriminant >= 0


def _intersect(shape: int, o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rays o + t d, (N, P, 3) in an object's own coordinates, against a unit shape: t (N, P) and normals (N, P, 3)."""
    # Rays along an axis divide by 0; what comes of it is no hit.
    with np.errstate(divide="ignore", invalid="ignore"):
        if SHAPES[shape] == "ball":
            t, normal = _hit_ball(o, d)
        elif SHAPES[shape] == "cube":
            t, normal = _hit_cube(o, d, half=0.8)
        elif SHAPES[shape] == "cone":
            t, normal = _hit_round(o, d, half=0.9, radius=0.95, is_cone=True)
        else:
            t, normal = _hit_round(o, d, half=0.9, radius=0.8, is_cone=False)
    return t, normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-9)


def _hit_points(o: np.ndarray, d: np.ndarray, t: np.ndarray) -> np.ndarray:
    """(N, P, 3): where rays hit, their origins where they don't."""
    return o + np.where(np.isfinite(t), t, 0)[..., None] * d


def _hit_ball(o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`_intersect` of radius 1."""
    a = (d * d).sum(-1)
    b = (o * d).sum(-1)
    c = (o * o).sum(-1) - 1
    t0, t1, real = _quadratic(a, b, c)
    t = _first_hit([t0, t1], [real, real])
    return t, _hit_points(o, d, t)


def _hit_cube(o: np.ndarray, d: np.ndarray, half: float) -> tuple[np.ndarray, np.ndarray]:
    """`_intersect` of side 2 `half`: a ray is in it where it is between each pair of opposite sides' planes."""
    t0 = (-half - o) / d
    t1 = (half - o) / d
    near = np.minimum(t0, t1)
    far = np.maximum(t0, t1)
    # It hits if it enters the last of the three pairs of planes before it leaves the first one.
    entry = near.max(-1)
    t = np.where((entry < far.min(-1)) & (entry > 1e-3), entry, np.inf)
    # The side that is hit is the one entered last; its normal points against the ray.
    normal = -np.sign(d) * (near == near.max(-1, keepdims=True))
    return t, normal


def _hit_round(
    o: np.ndarray, d: np.ndarray, half: float, radius: float, is_cone: bool
) -> tuple[np.ndarray, np.ndarray]:
    """`_intersect` of a cylinder, or a cone that tapers to nothing, of height 2 `half`; `radius` at its foot."""
    ox, oy, oz = np.moveaxis(o, -1, 0)
    dx, dy, dz = np.moveaxis(d, -1, 0)
    if is_cone:
        # The radius shrinks by k a unit of height: at height oy + t dy it is r0 + t slope.
        k = radius / (2 * half)
        r0 = k * (half - oy)
        slope = -k * dy
        cap_heights = [-half]
    else:
        k = 0.0
        r0 = radius
        slope = 0.0
        cap_heights = [-half, half]
    # x^2 + z^2 = (r0 + t slope)^2, the round side, as a t^2 + 2 b t + c = 0.
    a = dx * dx + dz * dz - slope**2
    b = ox * dx + oz * dz - r0 * slope
    c = ox * ox + oz * oz - r0 * r0
    t0, t1, real = _quadratic(a, b, c)
    candidates = [t0, t1]
    # The side ends at the foot and at the top (the equation's cone goes on above its tip).
    valid = [real & (np.abs(oy + t * dy) <= half) for t in candidates]
    # Flat ends: both of a cylinder, of a cone the foot alone.
    caps = [(y - oy) / dy for y in cap_heights]
    for t in caps:
        candidates.append(t)
        valid.append((ox + t * dx) ** 2 + (oz + t * dz) ** 2 <= radius**2)
    t = _first_hit(candidates, valid)
    hit = _hit_points(o, d, t)
    # A cone's normal leans upward as its side tapers; a cylinder's doesn't (k = 0).
    side_y = k * np.hypot(hit[..., 0], hit[..., 2])
    normal = np.stack([hit[..., 0], side_y, hit[..., 2]], -1)
    on_cap = np.any([t == cap for cap in caps], axis=0)
    cap_normal = -np.sign(dy)[..., None] * [0, 1, 0]
    return t, np.where(on_cap[..., None], cap_normal, normal)


def _cast(scenes: Scenes, origin: np.ndarray, direction: np.ndarray):
    """First object hit by each ray (S, P, 3): t (S, P), slot (S, P; -1 for none), world normal (S, P, 3)."""
    best = np.full(direction.shape[:2], np.inf, np.float32)
    slot = np.full(best.shape, -1)
    normals = np.zeros_like(direction)
    center = scenes.position()
    # The apparent radius is that at a depth of 1: in meters it is z times as large.
    radius = scenes.r * scenes.z
    cos = np.cos(scenes.yaw)
    sin = np.sin(scenes.yaw)
    for k in range(SLOTS):
        for shape in range(len(SHAPES)):
            # All scenes at once whose object in this slot has this shape.
            index = np.flatnonzero((scenes.color[:, k] >= 0) & (scenes.shape[:, k] == shape))
            if not len(index):
                continue
            c = cos[index, k, None, None].astype(np.float32)
            s = sin[index, k, None, None].astype(np.float32)
            scale = radius[index, k, None, None].astype(np.float32)
            # Rays in the object's own coordinates: there its center is 0, its size 1 and its yaw 0. Origin and
            # direction are scaled alike, so t stays the world's.
            o = _turn(origin[index] - center[index, k, None].astype(np.float32), c, s) / scale
            d = _turn(direction[index], c, s) / scale
            t, normal = _intersect(shape, np.broadcast_to(o, d.shape), d)
            # Of several objects on a ray the nearest is seen. Normals are turned back into the world (-s).
            closer = t < best[index]
            best[index] = np.where(closer, t, best[index])
            slot[index] = np.where(closer, k, slot[index])
            normals[index] = np.where(closer[..., None], _turn(normal, c, -s), normals[index])
    return best, slot, normals


def _turn(points: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Points (..., 3) turned around the vertical axis."""
    x, y, z = np.split(points, 3, -1)
    return np.concatenate([cos * x - sin * z, y, sin * x + cos * z], -1)


def render_scenes(scenes: Scenes, seed: int = 0) -> dict[str, np.ndarray]:
    """Ray-cast scenes: ``image`` (S, H, W, 3) uint8, ``depth`` (S, H, W) fp32 meters (SKY for the sky), ``mask``
    (S, H, W) uint8 class ids, ``visible`` (S, K) pixels of each object that can be seen."""
    rng = np.random.default_rng(seed)
    count = len(scenes)
    # Rays through the pixels' centers, (S, P, 3), with z = 1: so a hit's t is its depth.
    grid = (np.arange(SIZE) + 0.5) / SIZE
    direction = np.stack(np.broadcast_arrays(grid[None] - 0.5, HORIZON - grid[:, None], 1.0), -1)
    direction = np.broadcast_to(direction.reshape(1, -1, 3), (count, SIZE * SIZE, 3)).astype(np.float32)
    t, slot, normal = _cast(scenes, np.zeros((count, 1, 3), np.float32), direction)

    # Where no object is, the ground is seen, up to the distance of the sky.
    with np.errstate(divide="ignore"):
        t_floor = np.where(direction[..., 1] < 0, -CAMERA_HEIGHT / direction[..., 1], np.inf)
    is_floor = (slot < 0) & (t_floor < SKY)
    # Where the ground is seen; elsewhere the camera's own place, whose shadow is not looked at.
    point = direction * np.where(is_floor, t_floor, 0)[..., None]
    # The ground lies in shadow where an object stands between it and the light, which is nearly overhead.
    up = np.concatenate([scenes.light[:, :1], np.ones((count, 1)), scenes.light[:, 1:]], 1).astype(np.float32)
    _, shadowing_slot, _ = _cast(scenes, point, np.broadcast_to(up[:, None], point.shape))
    shadow = shadowing_slot >= 0

    # The ground's squares have a meter a side.
    checker = (np.floor(point[..., 0]) + np.floor(point[..., 2])) % 2
    brightness = np.where(shadow, 0.35, 1.0)
    floor = scenes.floor[:, None] * (0.85 + 0.3 * checker[..., None]) * brightness[..., None]
    # Objects are shaded by another light, the same in all scenes, and get no shadows.
    sun = np.array([-0.45, 0.75, -0.5]) / np.linalg.norm([-0.45, 0.75, -0.5])
    is_object = slot >= 0
    # Rays without an object look up slot 0; what comes of that is replaced below.
    color_index = np.take_along_axis(scenes.color, np.maximum(slot, 0), 1)
    albedo = np.array(list(COLORS.values()))[np.maximum(color_index, 0)]
    lit = albedo * (0.5 + 0.5 * np.maximum(normal @ sun, 0))[..., None]
    color = np.where(is_object[..., None], lit, floor)
    depth = np.where(is_object, t, np.where(is_floor, t_floor, SKY))

    # The share of light that comes through the haze: 1 at 2.5 meters, none from the sky.
    clear = np.exp(-scenes.haze[:, 3:] * (depth - 2.5))[..., None] * (depth < SKY)[..., None]
    haze = scenes.haze[:, None, :3]
    noise = rng.normal(0, 0.012, color.shape)
    image = clear * color + (1 - clear) * haze + noise

    # CLASSES: sky, floor, then the colors.
    mask = np.where(is_object, 2 + color_index, np.where(is_floor, 1, 0))
    square = (count, SIZE, SIZE)
    return {
        "image": (255 * np.clip(image, 0, 1)).round().astype(np.uint8).reshape(*square, 3),
        "depth": depth.astype(np.float32).reshape(square),
        "mask": mask.astype(np.uint8).reshape(square),
        "visible": (slot[..., None] == np.arange(SLOTS)).sum(1),
    }


def make_scenes(count: int, seed: int, desc: str = "rendering") -> tuple[Scenes, dict]:
    """``count`` scenes whose objects can all be seen (at least VISIBLE_PIXELS each), with their rendered arrays."""
    # More than asked for: those in which an object hides another are left out.
    scenes = sample_scenes(int(count * 1.15) + 8, seed)
    # In chunks, each with a seed for its noise: the result doesn't depend on which process renders it.
    starts = range(0, len(scenes), 32)
    chunks = [scenes[i : i + 32] for i in starts]
    seeds = [seed * 1_000_003 + i for i in starts]
    with ProcessPoolExecutor(2) as pool:
        rendered = pool.map(render_scenes, chunks, seeds)
        parts = list(tqdm(rendered, desc=desc, total=len(starts), unit="batch"))
    arrays = {}
    for name in parts[0]:
        arrays[name] = np.concatenate([part[name] for part in parts])
    keep = np.flatnonzero(all_seen(scenes, arrays["visible"]))[:count]
    if len(keep) < count:
        raise ValueError(f"only {len(keep)} of {count} scenes show all their objects; draw more scenes")
    return scenes[keep], {name: value[keep] for name, value in arrays.items()}


def all_seen(scenes: Scenes, visible: np.ndarray) -> np.ndarray:
    """(S,) bool: whether each of a scene's objects can be seen; ``visible`` (S, K) pixels."""
    is_absent = scenes.color < 0
    return np.all((visible >= VISIBLE_PIXELS) | is_absent, axis=1)
