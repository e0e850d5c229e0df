"""OLA-VLM -> plain LLaVA, FastVLM if its tower is a ConvNeXt; a model with attached predictors -> the same without:
`ola-vlm export` (commands/export.py).

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
from ..files.writing import check_empty
from ..inference.checkpoints import read_checkpoint
from ..modeling_ola_vlm import OlaVlmForConditionalGeneration
from ..processing_ola_vlm import OlaVlmProcessor
from ..training.attach import AttachedPredictors, detach_predictors
from ..training.run_record import check_holds_no_model

# Beginnings of the weights that no answer needs. The query tables' means are in the vocabulary's rows already.
TRAINING_ONLY = ("predictors.", "queries.", "logit_scales.")


def export_llava(
    model: OlaVlmForConditionalGeneration,
) -> LlavaForConditionalGeneration | FastVlmForConditionalGeneration:
    """The same model without predictors, query tables and logit scales; `model` is not changed. With a convolutional
    tower of timm it is transformers' FastVLM, which is LLaVA with such a tower."""
    # Fields that LLaVA doesn't have, and those that name our class, our code and the version that wrote them.
    ours = {"model_type", "tasks", "task_token_ids", "has_predictors", "vocab_padding"}
    ours |= {"auto_map", "architectures", "transformers_version"}
    fields = {name: value for name, value in model.config.to_dict().items() if name not in ours}
    # LLaVA takes a tower's states as (N, T, E); a convolutional tower's are maps (N, E, h, w), which FastVLM flattens.
    if model.config.vision_config.model_type == "timm_wrapper":
        plain = FastVlmForConditionalGeneration(FastVlmConfig(**fields))
    else:
        plain = LlavaForConditionalGeneration(LlavaConfig(**fields))
    # The type first: `load_state_dict` copies into the parameters' own type, which is float32 in a new model.
    plain = plain.to(model.dtype)  # pyright: ignore[reportArgumentType] (its stub)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(TRAINING_ONLY)}
    # Strict: a weight that is left without a place, or a place without a weight, is an error.
    plain.load_state_dict(weights)
    plain.generation_config = model.generation_config
    return plain.eval()


def export_processor(processor: OlaVlmProcessor) -> LlavaProcessor:
    """
    LLaVA's processor whose chat template writes the task tokens after `<image>`: they are ordinary text for it.
    Prompts that don't come from the template have to say `<image><gen_0>...` themselves.
    """
    processor = copy.deepcopy(processor)
    # One that was loaded from a checkpoint with code names that code, which an export doesn't have.
    processor.image_processor.__dict__.pop("auto_map", None)
    processor.tokenizer.init_kwargs.pop("auto_map", None)
    # Our processor adds the task tokens where it expands `<image>` (`replace_image_token`); LLaVA's adds none.
    template = processor.chat_template
    if template is not None:
        assert isinstance(template, str)
        # Where the template writes an image's token, the task tokens follow, as they do in our sequences.
        template = template.replace(processor.image_token, processor.image_token + "".join(processor.task_tokens))
    names = ["patch_size", "vision_feature_select_strategy", "image_token", "num_additional_image_tokens"]
    fields = {name: getattr(processor, name) for name in names}
    return LlavaProcessor(processor.image_processor, processor.tokenizer, chat_template=template, **fields)


@command("export")
def main(args: Namespace) -> None:
    check_holds_no_model(args.out)
    check_empty(args.out)
    model, processor = read_checkpoint(args.checkpoint, llava_as_ours=True, dtype="auto")
    # Predictors are a part of our own model's class; any other class has them mixed in, and becomes what it was.
    if isinstance(model, OlaVlmForConditionalGeneration):
        plain = export_llava(model)
    elif isinstance(model, AttachedPredictors):
        plain = detach_predictors(model)
    else:
        what = f"{args.checkpoint} is a {model.config.model_type} without predictors"
        raise ValueError(f"{what}: there is nothing to take off")
    plain.save_pretrained(args.out)
    if processor is None:
        print(f"Wrote the model alone to {args.out}: the checkpoint has no processor.")
        return
    if isinstance(processor, OlaVlmProcessor):
        processor = export_processor(processor)
    processor.save_pretrained(args.out)
    print(f"Wrote model and processor to {args.out}.")
    tell(f"Next: serve it (docs/serving.md), or ola-vlm chat {args.out} IMAGE")
