"""Processor of the multi-encoder LLaVA: each encoder gets its own view of an image, as in `targets.encoders`."""

import torch
from transformers import LlavaImageProcessor, LlavaProcessor, PreTrainedConfig


class MultiEncoderLlavaProcessor(LlavaProcessor):
    """
    LLaVA's processor whose `pixel_values` (N, P) are all encoders' views of an image, flattened, one after the other.

    `image_processor`: of the base encoder. `views`: for each further encoder the arguments of its
    `LlavaImageProcessor`, in the order of `config.encoders`. `num_image_tokens`: `config.num_image_tokens`.
    Every argument is named, since a processor saves only the named ones.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        image_token="<image>",
        num_image_tokens=None,
        views=None,
        **kwargs,
    ):
        self.num_image_tokens = num_image_tokens
        self.views = list(views or [])
        # Made anew from `views`, plain dicts, which a processor can save.
        self._processors = [LlavaImageProcessor(**view) for view in self.views]
        super().__init__(image_processor, tokenizer, chat_template=chat_template, image_token=image_token, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """ProcessorMixin's. The class is at hand, so nobody is asked whether to run the folder's own code."""
        kwargs.setdefault("trust_remote_code", False)
        if not kwargs["trust_remote_code"]:
            fields, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
            # AutoTokenizer doesn't know our model type and would try config.json by an empty class, with a warning.
            if fields.get("model_type") == "multi_encoder_llava":
                kwargs.setdefault("config", PreTrainedConfig())
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def _process_images(self, images, **kwargs):
        # Views are joined below, so they have to be tensors, whatever the caller asks for.
        kwargs["return_tensors"] = "pt"
        processed, replacements = super()._process_images(images, **kwargs)
        # (N, 3, S, S) each -> (N, sum of 3 * S * S), the base encoder's first.
        views = [processed, *(processor(images, **kwargs) for processor in self._processors)]
        processed["pixel_values"] = torch.cat([view["pixel_values"].flatten(1) for view in views], dim=1)
        return processed, replacements

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The text that stands for one image."""
        return self.image_token * self.num_image_tokens  # pyright: ignore[reportOperatorIssue] (a number when images are processed)


MultiEncoderLlavaProcessor.register_for_auto_class()
