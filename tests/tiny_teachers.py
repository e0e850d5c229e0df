"""Tiny teachers in their real transformers classes, saved as folders (the shapes of the miniature's own ones)."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    InternVLConfig,
    InternVLForConditionalGeneration,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTConfig,
    ViTForImageClassification,
)

SIZE, GRID = 64, 8


def random_images(count: int, seed: int = 0, size: tuple[int, int] = (SIZE, SIZE)) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize(size, Image.Resampling.BICUBIC) for one in coarse]


def _save(model, folder: Path, mean: float):
    model.eval().save_pretrained(folder)
    preprocessing = {"image_mean": [mean] * 3, "image_std": [0.25] * 3, "size": {"height": SIZE, "width": SIZE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))


def save_depth_anything(folder: Path):
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, patch_size=8, image_size=SIZE,
        out_features=stages, reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, patch_size=8, reassemble_hidden_size=32, neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16, head_hidden_size=8,
    )  # fmt: skip
    _save(DepthAnythingForDepthEstimation(config), folder, mean=0.5)


def save_oneformer(folder: Path, tokenizer: bool = True):
    backbone = SwinConfig(
        image_size=SIZE, patch_size=2, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"], drop_path_rate=0.0,
    )  # fmt: skip
    config = OneFormerConfig(
        backbone_config=backbone, strides=[2, 4, 8, 16], common_stride=2, num_labels=5, num_queries=6, hidden_dim=32,
        conv_dim=32, mask_dim=32, dim_feedforward=32, encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=2,
        query_dec_layers=1, num_attention_heads=4, task_seq_len=7, text_encoder_vocab_size=20, text_encoder_width=64,
        text_encoder_num_layers=1, text_encoder_n_ctx=2, text_encoder_context_length=7, is_training=True,
        train_num_points=64,
    )  # fmt: skip
    _save(OneFormerForUniversalSegmentation(config), folder, mean=0.45)
    if tokenizer:
        words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "the", "task", "is", "semantic"])}
        words_tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        words_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = PreTrainedTokenizerFast(tokenizer_object=words_tokenizer, pad_token="[PAD]", unk_token="[UNK]")
        fast.save_pretrained(folder)


def save_clip_image(folder: Path):
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE,
        patch_size=16, projection_dim=12,
    )  # fmt: skip
    _save(CLIPVisionModelWithProjection(config), folder, mean=0.4)


def timm_model(architecture: str, **arguments) -> TimmWrapperModel:
    seen = {"input_size": [3, SIZE, SIZE], "mean": [0.55] * 3, "std": [0.25] * 3}
    return TimmWrapperModel(TimmWrapperConfig(architecture=architecture, model_args=arguments, pretrained_cfg=seen))


_WIDTH = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
_VIT = {**_WIDTH, "image_size": SIZE, "patch_size": 8, "intermediate_size": 48}
_DINO = {**_WIDTH, "image_size": SIZE, "patch_size": 8, "mlp_ratio": 2}
_TEXT = {**_WIDTH, "intermediate_size": 48, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1}
_CONV = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
VISION_MODELS = {  # further teachers as their checkpoints come: alone, or as a part of a larger model
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**_VIT)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**_DINO)),
    "dinov2_registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**_DINO, num_register_tokens=4)),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**_VIT, num_register_tokens=4)),
    "dinov3_convnext": lambda: DINOv3ConvNextModel(DINOv3ConvNextConfig(**_CONV)),
    "clip": lambda: CLIPModel(CLIPConfig(vision_config=_VIT, text_config=_TEXT)),
    "vit_classifier": lambda: ViTForImageClassification(ViTConfig(**_VIT)),
    "internvl": lambda: InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config={**_VIT, "image_size": [SIZE, SIZE], "patch_size": [8, 8]},
            text_config={**_TEXT, "model_type": "qwen2", "num_key_value_heads": 2},
            image_token_id=5,
        )
    ),
    "timm_vit": lambda: timm_model(
        "vit_small_patch14_reg4_dinov2", img_size=SIZE, patch_size=8, embed_dim=32, depth=2, num_heads=2
    ),
    "timm_convnext": lambda: timm_model("convnext_atto", depths=[1, 1, 1, 1], dims=[8, 16, 24, 32]),
}


def save_vision(folder: Path, kind: str = "siglip"):
    torch.manual_seed(0)
    model = VISION_MODELS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():  # some start as zeros: layer scales, position embeddings
            parameter.add_(torch.randn_like(parameter) * 0.05)
    _save(model, folder, mean=0.55)
    if kind.startswith("timm"):  # timm's own folders say all in config.json, and not that transformers wraps them
        (folder / "preprocessor_config.json").unlink()
        config = json.loads((folder / "config.json").read_text())
        config.pop("model_type")
        (folder / "config.json").write_text(json.dumps(config))


def save_tiny_teachers(folder: Path) -> dict[str, Path]:
    """Saves a teacher for every encoder under `folder`; returns encoder name -> folder."""
    torch.manual_seed(0)
    save = {"depth_anything": save_depth_anything, "oneformer": save_oneformer, "clip_image": save_clip_image}
    save["vision"] = save_vision
    for name, function in save.items():
        function(folder / name)
    return {name: folder / name for name in save}
