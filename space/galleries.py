"""The layers' pictures as the page shows them, and what their colors mean."""

from collections.abc import Mapping, Sequence
from html import escape

import matplotlib
import numpy as np
from PIL import Image

from ..probing.pictures import NOTHING_SEEN, TARGET, Pictures, note_of

# As short as a phone needs it.
HEADINGS = {TARGET: "decoded", NOTHING_SEEN: "nothing seen"}
MAX_LEGEND = 12  # classes


def gallery(columns: Pictures) -> list[tuple[Image.Image, str]]:
    """One image's pictures, each with its heading and note."""
    captioned = []
    for heading, pictures in columns.items():
        # The visitor's picture stands in the chat already.
        if heading == "image":
            continue
        picture = pictures[0]
        note = note_of(picture).replace("cosine ", "")
        caption = f"{HEADINGS.get(heading, heading)}\n{note}"
        captioned.append((picture, caption.strip()))
    return captioned


def legend(colors: Mapping[str, tuple], pictures: Sequence[Image.Image]) -> str:
    """The classes that are drawn in the pictures, the largest first, as HTML."""
    # (pixels of all pictures, RGB): a class's area is counted over all of them.
    pixels = np.concatenate([np.asarray(picture).reshape(-1, 3) for picture in pictures])
    drawn, counts = np.unique(pixels, axis=0, return_counts=True)
    areas = dict(zip(map(tuple, drawn.tolist()), counts.tolist(), strict=True))
    names = [name for name, color in colors.items() if color in areas]
    names.sort(key=lambda name: -areas[colors[name]])
    entries = []
    for name in names[:MAX_LEGEND]:
        entries.append(f'<i class="swatch" style="background:rgb{colors[name]}"></i>{escape(name)}')
    if len(names) > MAX_LEGEND:
        entries.append(f" and {len(names) - MAX_LEGEND} more")
    return "".join(entries)


def depth_scale() -> str:
    """The colors of `pictures.draw_depth` from far to close, as HTML."""
    steps = matplotlib.colormaps["inferno"](np.linspace(0, 1, 9), bytes=True)[:, :3].tolist()
    colors = ", ".join(f"rgb{tuple(color)}" for color in steps)
    scale = f'<i class="scale" style="background:linear-gradient(to right, {colors})"></i>'
    return f'<span class="depths">far{scale}close</span>'
