"""What the layers of a frozen vision-language model hold while it looks at an image.

N images, one a row; T sequence, V tokens of an image's grid, Q positions of a target, H LLM width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin
from transformers.models.llava import LlavaImageProcessor

from ..targets.images import open_image
from ..training.rows import PROMPT

# Families in whose tokens the tiles can't be told from the whole picture -> the processor's options that leave out the
# tiles.
WHOLE_PICTURE = {"internvl": {"crop_to_patches": False}}


@dataclass
class ImageStates:
    """`hidden[layer]` (N, T, H): 0 the embeddings, the last one after the final norm; `attended_NT`: no padding.

    `columns[n]` (rows * columns,): where image n's grid is in its row, from the top left; `grids[n]`: rows, columns.
    """

    hidden: Sequence[Tensor]
    attended_NT: Tensor
    columns: list[Tensor]
    grids: list[tuple[int, int]]

    @property
    def num_layers(self) -> int:
        """L + 1."""
        return len(self.hidden)

    def of_grid(self, layer: int, chosen: Sequence[int] | None = None) -> Tensor:
        """The grid's tokens of the images, or of the `chosen` ones (N, V, H), which must have equally many; fp32."""
        if chosen is None:
            chosen = range(len(self.grids))
        rows = torch.tensor(list(chosen), device=self.attended_NT.device)
        columns = torch.stack([self.columns[n] for n in chosen])
        # Rows (N, 1) and columns (N, V) choose each image's own tokens: (N, V, H).
        return self.hidden[layer][rows[:, None], columns].float()

    def positions(self, layer: int, length: int) -> Tensor:
        """Inputs for `length` target positions (N, Q, H), by `to_positions` and each image's own grid; fp32."""
        # Grids of one size go together; others, such as Qwen's without the square, one image at a time.
        if len(set(self.grids)) == 1:
            return to_positions(self.of_grid(layer), length, self.grids[0])
        return torch.cat([to_positions(self.of_grid(layer, [n]), length, grid) for n, grid in enumerate(self.grids)])


def to_positions(states_NVH: Tensor, length: int, grid: tuple[int, int] | None = None) -> Tensor:
    """Image-token states as inputs for `length` target positions, (N, Q, H): token to token if the grids agree; else
    the grid (square if it isn't given) is pooled or interpolated; their mean for one embedding an image.

    A grid that isn't square is an image's at its own aspect ratio, while the target is of the image padded to a
    square: its border rows or columns are repeated to a square first, half a token off at most.
    """
    side = round(states_NVH.shape[1] ** 0.5)
    rows, columns = grid or (side, side)
    # One embedding of the whole image, as gen's, has no grid.
    if length == 1:
        return states_NVH.mean(1, keepdim=True)
    if rows == columns and rows * columns == length:
        return states_NVH
    # (N, V, H) -> (N, H, rows, columns)
    maps = states_NVH.transpose(1, 2).unflatten(2, (rows, columns))
    side = max(rows, columns)
    target_side = round(length**0.5)
    # Teachers see the picture in a square: its margins get the states at the border.
    if rows != columns:
        top = (side - rows) // 2
        left = (side - columns) // 2
        maps = F.pad(maps, (left, side - columns - left, top, side - rows - top), mode="replicate")
    if side > target_side:
        # Each cell is the mean of what lies in it.
        maps = F.interpolate(maps, size=target_side, mode="area")
    elif side < target_side:
        maps = F.interpolate(maps, size=target_side, mode="bilinear")
    return maps.flatten(2).transpose(1, 2)


class StateReader:
    """Images -> `ImageStates` of any image-text-to-text model of transformers.

    Args:
        model, processor: of one family; the processor has a chat template.
        prompt: the user's words after the image. Image tokens don't see what follows them.
        square: pad images to the square that the teachers see before the processor gets them, with its mean color;
            else each has the shape that the model gives it.

    The grid is that of the whole picture: all image tokens if they are a square; Qwen's rows and columns; of models
    that also see tiles, LLaVA-NeXT and Idefics3 (SmolVLM), the view of the whole; the base encoder's of the
    multi-encoder baseline. ValueError if none of these fits.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, prompt: str = PROMPT, square: bool = True):
        self.model = model.eval()
        self.processor: Any = processor
        self.prompt = prompt
        self.square = square
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        self.text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tokenizer = processor.tokenizer
        if tokenizer.pad_token is None:
            # Padding is masked, so any token will do; Llama 3's tokenizer has none of its own.
            tokenizer.pad_token = tokenizer.eos_token
        # Some chat templates write it, others leave it to the tokenizer.
        begins = bool(tokenizer.bos_token) and self.text.startswith(tokenizer.bos_token)
        self.options = {"padding": True, "return_tensors": "pt", "add_special_tokens": not begins}
        self.options |= WHOLE_PICTURE.get(model.config.model_type, {})

    def view(self, source) -> Image.Image:
        """The image as the processor gets it."""
        image = open_image(source)
        image_processor = self.processor.image_processor
        pads_itself = isinstance(image_processor, LlavaImageProcessor) and image_processor.do_pad
        if not self.square or pads_itself or image.width == image.height:
            return image
        side = max(image.size)
        mean_color = tuple(round(255 * mean) for mean in image_processor.image_mean)
        return ImageOps.pad(image, (side, side), color=mean_color)

    def inputs(self, images: Sequence) -> BatchFeature:
        """The model's, one row an image. `images`: whatever `open_image` takes, at least one."""
        views = list(map(self.view, images))
        inputs = self.processor(text=[self.text] * len(views), images=[[view] for view in views], **self.options)
        return inputs.to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def __call__(self, images: Sequence) -> ImageStates:
        inputs = self.inputs(images)
        # Of the logits, which are the widest, only the last position's, as 0 means all.
        hidden = self.model(**inputs, output_hidden_states=True, logits_to_keep=1, use_cache=False).hidden_states
        # A model that lies on several devices gives states on each of them.
        hidden = [states.to(self.model.device) for states in hidden]
        # The processor's own may be the mark that its template writes: Gemma 3's is. Not every configuration has one.
        image_token_id = getattr(self.model.config, "image_token_id", self.processor.image_token_id)
        is_image_NT = inputs["input_ids"] == image_token_id
        states = ImageStates(hidden, attended_NT=inputs["attention_mask"].bool(), columns=[], grids=[])
        for n, is_image_T in enumerate(is_image_NT):
            columns, grid = self._grid(is_image_T.nonzero()[:, 0], inputs, n)
            states.columns.append(columns)
            states.grids.append(grid)
        return states

    def _grid(self, columns: Tensor, inputs: BatchFeature, n: int) -> tuple[Tensor, tuple[int, int]]:
        """Of image n, whose tokens are at those columns: where its grid's tokens are, and the grid's size."""
        config = self.model.config
        kind = config.model_type
        count = len(columns)
        if "image_grid_thw" in inputs:
            # Qwen: rows and columns of patches, of which merge_size * merge_size become one token.
            merge_size = self.processor.image_processor.merge_size
            _, rows, wide = inputs["image_grid_thw"][n].tolist()
            grid = (rows // merge_size, wide // merge_size)
        else:
            if kind in ("idefics3", "smolvlm"):
                # Tiles, then the whole picture.
                columns = columns[-self.processor.image_seq_len :]
            elif kind in ("llava_next", "llava_onevision"):
                # The whole picture, then tiles.
                columns = columns[: (config.vision_config.image_size // config.vision_config.patch_size) ** 2]
            elif kind == "multi_encoder_llava":
                # The base encoder's, then perhaps the others'.
                columns = columns[: config.image_seq_length]
            # What is left is taken for a square; if it is none, that is an error below.
            side = round(len(columns) ** 0.5)
            grid = (side, side)
        if grid[0] * grid[1] != len(columns):
            raise ValueError(
                f"{type(self.model).__name__} makes {count} tokens of an image, and which of them are the grid of the "
                "whole picture isn't known: add its family to probing.states.StateReader"
            )
        return columns, grid
