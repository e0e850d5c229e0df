"""An uploaded file as a picture: what is wrong with it is found by its header first, then it is decoded, once."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from PIL import Image

from ..targets.images import LONGEST_STRIP, DamagedImage, ImageError, open_image
from . import limits

# One at a time: a picture of MAX_PIXELS takes hundreds of megabytes.
decoding = threading.Lock()


@contextmanager
def readable(path: str) -> Iterator[Image.Image]:
    """An uploaded file, of which only the header is read. ValueError tells the visitor what is wrong with it, also if
    that shows inside the block."""
    name = Path(path).name[-60:]
    try:
        with Image.open(path, formats=limits.FORMATS) as file:
            yield file
    except FileNotFoundError as error:
        raise ValueError(f"{name} is gone: images are kept for an hour. Clear the chat and send it again") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has far too many pixels: shrink it first") from error
    except (DamagedImage, OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"{name} can't be read as an image: send a whole {', '.join(limits.FORMATS)} file") from error
    except ImageError as error:
        # Without the folder, which is no visitor's business.
        raise ValueError(f"{name}: {error.reason}") from error


def picture_size(path: str) -> tuple[int, int]:
    """Width and height in pixels by a file's header, for little of what `read_image` costs."""
    name = Path(path).name[-60:]
    with readable(path) as file:
        # Known from the header: nothing is decoded yet.
        if file.width * file.height > limits.MAX_PIXELS:
            size = f"{file.width} x {file.height} pixels"
            most = f"{limits.MAX_PIXELS // 10**6} million"
            raise ValueError(f"{name} has {size}, more than {most}: shrink it first")
        return file.size


def shrunk_size(size: tuple[int, int]) -> tuple[int, int]:
    """Of a picture as the models get it: at most MAX_SIDE pixels a side."""
    scale = min(1, limits.MAX_SIDE / max(size))
    width, height = (max(1, round(side * scale)) for side in size)
    return width, height


def read_image(path: str) -> Image.Image:
    """An uploaded file as RGB, at most MAX_SIDE pixels a side. ValueError tells the visitor what is wrong with it."""
    # Opened even if it was decoded before: a file that is gone is not shown again.
    with readable(path):
        changed = Path(path).stat().st_mtime_ns
    with decoding:
        return decode(path, changed)


@lru_cache(limits.PICTURES_KEPT)
def decode(path: str, changed: int) -> Image.Image:
    """`read_image`, once for each file; `changed` is part of the cache's key."""
    picture_size(path)
    with readable(path) as file:
        # A large JPEG is decoded small.
        file.draft("RGB", (limits.MAX_SIDE, limits.MAX_SIDE))
        file.load()
        return open_image(shrink(file))


def shrink(file: Image.Image) -> Image.Image:
    """A large picture, smaller but otherwise as it was, before conversions make several copies of it."""
    is_small = max(file.size) <= limits.MAX_SIDE
    # `open_image` refuses strips and pictures of more than 8 bits.
    is_refused = max(file.size) > LONGEST_STRIP * min(file.size) or file.mode.startswith("I")
    if is_small or is_refused:
        return file
    # Colors of a palette can't be averaged, nor can transparency that isn't a channel.
    is_transparent = file.has_transparency_data
    if is_transparent and file.mode not in ("RGBA", "LA"):
        file = file.convert("RGBA")
    elif file.mode in ("P", "1"):
        file = file.convert("RGB")
    file.thumbnail((limits.MAX_SIDE, limits.MAX_SIDE))
    return file
