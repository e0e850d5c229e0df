"""OLA-VLM -> plain LLaVA, FastVLM if its tower is a ConvNeXt: `ola-vlm export` (commands/export.py).

Task tokens are rows of the vocabulary, so the logits stay the same.
"""

import copy
from argparse import Namespace

from transformers import (
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from ..commands.running import command, tell
from ..inference.checkpoints import read_checkpoint
from ..modeling_ola_vlm import OlaVlmForConditionalGeneration
from ..processing_ola_vlm import OlaVlmProcessor
from ..training.run_record import weights_in

TRAINING_ONLY = ("predictors.", "queries.", "logit_scales.")


def export_llava(
    model: OlaVlmForConditionalGeneration,
) -> LlavaForConditionalGeneration | FastVlmForConditionalGeneration:
    """The same model without predictors, query tables and logit scales; `model` is not changed. With a convolutional
    tower of timm it is transformers' FastVLM, which is LLaVA with such a tower."""
    ours = {"model_type", "tasks", "task_token_ids", "has_predictors", "vocab_padding"}
    ours |= {"auto_map", "architectures", "transformers_version"}
    fields = {name: value for name, value in model.config.to_dict().items() if name not in ours}
    if model.config.vision_config.model_type == "timm_wrapper":
        plain = FastVlmForConditionalGeneration(FastVlmConfig(**fields))
    else:
        plain = LlavaForConditionalGeneration(LlavaConfig(**fields))
    plain = plain.to(model.dtype)  # pyright: ignore[reportArgumentType] (its stub)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(TRAINING_ONLY)}
    plain.load_state_dict(weights)
    plain.generation_config = model.generation_config
    return plain.eval()


def export_processor(processor: OlaVlmProcessor) -> LlavaProcessor:
    """
    LLaVA's processor whose chat template writes the task tokens after `<image>`: they are ordinary text for it.
    Prompts that don't come from the template have to say `<image><gen_0>...` themselves.
    """
    processor = copy.deepcopy(processor)
    processor.image_processor.__dict__.pop("auto_map", None)  # a loaded one's name our code, which isn't written
    processor.tokenizer.init_kwargs.pop("auto_map", None)
    template = processor.chat_template
    if template is not None:
        assert isinstance(template, str)
        template = template.replace(processor.image_token, processor.image_token + "".join(processor.task_tokens))
    names = ["patch_size", "vision_feature_select_strategy", "image_token", "num_additional_image_tokens"]
    fields = {name: getattr(processor, name) for name in names}
    return LlavaProcessor(processor.image_processor, processor.tokenizer, chat_template=template, **fields)


@command("export")
def main(args: Namespace) -> None:
    if weights_in(args.out) is not None:
        raise ValueError(f"{args.out} has {weights_in(args.out)} already: choose another folder")
    model, processor = read_checkpoint(args.checkpoint, llava_as_ours=True, dtype="auto")
    if not isinstance(model, OlaVlmForConditionalGeneration):
        raise ValueError(f"{args.checkpoint} is a {model.config.model_type}: only an OLA-VLM becomes a plain LLaVA")
    export_llava(model).save_pretrained(args.out)
    if processor is None:
        print(f"Wrote the model alone to {args.out}: the checkpoint has no processor.")
        return
    assert isinstance(processor, OlaVlmProcessor)
    export_processor(processor).save_pretrained(args.out)
    print(f"Wrote model and processor to {args.out}.")
    tell(f"Next: serve it (docs/serving.md), or ola-vlm chat {args.out} IMAGE")
