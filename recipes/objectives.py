"""Objectives other than the paper's, each a change of a run (docs/objectives.md).

`words`: the projector's output is pulled to the language model's embeddings of the words for what two teachers see in
each patch. `moments`: to the mean and deviation of these alone. `patch`: a linear layer predicts the teachers'
features from the image token of the same place; `patch_half`: in the first half of fine-tuning, too.
"""

from .miniature import OBJECTIVES, stored_targets
from .paper import LLAMA3_VIT, WEIGHTS, both, chat_template
from .tables import Run, Table

WORDS = {
    "name": "words",
    # What enters the language model's first block: an image's tokens are what the projector gives.
    "layers": [0],
    "predictor": "none",
    "target": "words",
    # The 24 x 24 patches of the ViT at 336 pixels.
    "target_length": 576,
    "loss": "mse",
    "loss_weight": 1.0,
    "contrastive_weight": 0.0,
}
MOMENTS = {**WORDS, "name": "moments", "loss": "moments"}
# COCO's class names, and five words of depth (`targets.words.DEPTH_WORDS`) for a fifth of an image's patches each.
WORD_TEACHERS = {
    "class": {**WEIGHTS["oneformer_coco"], "encoder": "class_words"},
    "depth": {**WEIGHTS["depth_large"], "encoder": "depth_words"},
}
COMMERCIAL_WORD_TEACHERS = {**WORD_TEACHERS, "depth": {**WEIGHTS["depth_small"], "encoder": "depth_words"}}
# ChatML, with the answers marked.
QWEN3 = {
    "language_model": "Qwen/Qwen3-8B",
    "model_overrides": {
        "chat_template": chat_template(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
            "'<|im_start|>' + role + '\n'",
            "<|im_end|>\n",
        )
    },
}


def miniature_stages(name: str) -> dict[str, dict]:
    stages = {"pretrain": {}, "finetune": {}, **OBJECTIVES[name]}
    # Plain fine-tuning has no targets.
    if stages["finetune"].get("embedding_losses"):
        stages["finetune"] = {**stored_targets(), **stages["finetune"]}
    return stages


# The control with other images' targets is --shuffle-targets true.
MINIATURE = Table(
    "Other objectives on the miniature.",
    runs=[
        Run(f"miniature_{name}", "miniature", miniature_stages(name))
        for name in OBJECTIVES
        # One flag more than its objective, so no recipe of its own.
        if not name.endswith("_shuffled")
    ],
    made_by="`ola-vlm data miniature` (or the study, `make miniature`)",
)
LARGE = Table(
    "Other objectives on the paper's data: not run yet.",
    runs=[
        Run("words_llama3_vit", LLAMA3_VIT, both(tasks=[WORDS], teachers={"words": WORD_TEACHERS})),
        Run("moments_llama3_vit", LLAMA3_VIT, both(tasks=[MOMENTS], teachers={"moments": WORD_TEACHERS})),
        # The same with another language model, for which words have other tokens.
        Run("words_qwen3_vit", "words_llama3_vit", both(**QWEN3)),
    ],
)
TABLES = (MINIATURE, LARGE)
