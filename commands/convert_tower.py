"""An open_clip checkpoint with a trunk of timm's -> a folder that is a vision tower: `ola-vlm convert-tower`.

The paper's ConvNeXt-XXL makes 24x24 tokens of 768 pixels (`recipes.paper.VISION_TOWERS`): `ola-vlm convert-tower
laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup weights/clip_convnext_xxl --image_size 768`.
"""

from .parsing import Parser, count


def parser() -> Parser:
    parser = Parser("convert-tower", __doc__)
    parser.add_argument("checkpoint", metavar="OPEN_CLIP", help="folder or repository of an open_clip model")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--image_size", type=count, help="pixels a side (its own training's by default)")
    return parser
