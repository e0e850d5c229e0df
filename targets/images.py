"""The one way to open a picture: student, teachers, probes, benchmarks, the chat and the Space see the same one."""

import io
import os
import re
import struct
from contextlib import nullcontext
from pathlib import Path

from PIL import ExifTags, Image

IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

# What Pillow decodes by itself. Not EPS, say, which it would hand to Ghostscript, a program that runs what is in it.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Times its shorter side: cropped by that one it would become a bomb.
LONGEST_STRIP = 500
# How a picture is turned upright, by what its EXIF block says of the camera; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Where Pillow looks for that, in a picture's `info`.
TELL_ORIENTATION = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


class ImageError(ValueError):
    """A picture that can't be used: `name` and `reason`, which also says what to do."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class DamagedImage(ImageError):
    """A file that can't be decoded: damaged, cut off, no picture at all, or of another format."""


def image_files(folder: str | Path, pattern: str = "**/*") -> list[str]:
    """Those of a folder and the folders in it, by their endings, in one order; none if there is no such folder."""
    return sorted(str(path) for path in Path(folder).glob(pattern) if path.suffix.lower() in IMAGE_ENDINGS)


def source_name(source: Image.Image | str | Path | dict) -> str:
    if isinstance(source, dict):
        return str(source.get("path") or "in the row")
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or "an image")
    return str(source)


def open_image(source: Image.Image | str | Path | dict) -> Image.Image:
    """An image, file or `{"bytes"}` (of a Hugging Face dataset) as RGB, upright and on white as transformers reads it.

    ImageError (a ValueError) for a file that is damaged, cut off, or of a format that isn't in `FORMATS`; for 16 or 32
    bits a pixel, which would saturate; for a picture whose square is beyond Pillow's limit (`MAX_IMAGE_PIXELS`: 9,459
    pixels a side), and for a strip. OSError for what isn't there or may not be read.
    """
    name = source_name(source)
    try:
        with _opened(source) as image:
            _check(image, name)
            upright = turn_upright(image)
            if upright.has_transparency_data:
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright.convert("RGBA"))
            return upright.convert("RGB")
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        # Of damaged files Pillow raises all sorts of errors, a bare Exception among them (DecompressionBombError).
        # Not there, a folder, no permission.
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"there is no file {name}") from error
        if isinstance(error, IsADirectoryError):
            raise IsADirectoryError(f"{name} is a folder, no image") from error
        if isinstance(error, OSError) and error.errno is not None:
            raise
        formats = ", ".join(FORMATS)
        # Of bytes Pillow names a place in memory, another one each time.
        what = re.sub(r" <_io\.BytesIO object at \w+>", "", f"{type(error).__name__}: {error}")
        raise DamagedImage(name, f"{what}: give a whole file of {formats}") from error


def turn_upright(image: Image.Image) -> Image.Image:
    """The decoded picture: phones store it as the sensor saw it, and a tag says how to turn it."""
    # Not within what is forgiven below: damaged pixels are an error.
    image.load()
    # That one tag alone, while `ImageOps.exif_transpose` writes the whole block anew, which it can't with some that it
    # can read. What Pillow raises of a block: of another header SyntaxError, of one that is cut off struct.error, of
    # no hexadecimal digits ValueError, of a text in its place TypeError. Other viewers show the picture all the same.
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, struct.error, ValueError, TypeError):
        return image
    turn = TURNS.get(orientation)
    if turn is None:
        return image
    upright = image.transpose(turn)
    # Who opens it again, as teachers do with what the student got, must not turn it once more.
    for name in TELL_ORIENTATION:
        upright.info.pop(name, None)
    return upright


def _opened(source: Image.Image | str | Path | dict):
    """A context that gives the picture, not decoded yet."""
    if isinstance(source, Image.Image):
        return nullcontext(source)
    if isinstance(source, dict) and source.get("bytes") is None:
        raise DamagedImage(source_name(source), "the row has no bytes of it: save the data set with its images inside")
    file = io.BytesIO(source["bytes"]) if isinstance(source, dict) else source
    # A pipe or a device would be waited for, or never end. What isn't there, and a folder, are OSErrors of their own.
    if isinstance(file, (str, Path)) and os.path.exists(file) and not (os.path.isfile(file) or os.path.isdir(file)):
        raise DamagedImage(source_name(source), "it is no file: give a whole one")
    return Image.open(file, formats=FORMATS)


def _check(image: Image.Image, name: str) -> None:
    """ImageError, before anything is decoded."""
    size = f"{image.width} x {image.height} pixels"
    # Opened by someone else. (MPO is what Pillow calls a telephone's JPEG with more pictures in it.)
    if image.format is not None and image.format not in (*FORMATS, "MPO"):
        raise ImageError(name, f"it is {image.format}: give a file of {', '.join(FORMATS)}")
    # Pillow only warns at its limit; and a narrow image becomes a bomb when it is padded to a square.
    if Image.MAX_IMAGE_PIXELS is not None and max(image.size) ** 2 > Image.MAX_IMAGE_PIXELS:
        raise ImageError(name, f"it has {size}: a decompression bomb? Shrink it first")
    if max(image.size) > LONGEST_STRIP * min(image.size):
        raise ImageError(name, f"it is a strip of {size}: leave it out")
    if image.mode.startswith("I") or image.mode == "F":
        raise ImageError(name, f"it has mode {image.mode}, whose values would saturate: convert it to 8 bits first")
