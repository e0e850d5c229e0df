"""Parts -> OLA-VLM, reference checkpoint -> OLA-VLM, OLA-VLM -> plain LLaVA."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import encode, make_tokenizer, random_rows, tiny_tasks
from PIL import Image
from safetensors.torch import load_file, save_file
from training_helpers import llava_sample, write_llava
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma4TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    Llama4TextConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
    TimmWrapperConfig,
    TimmWrapperModel,
)

from ola_vlm.convert.export import export_llava
from ola_vlm.convert.export import main as export
from ola_vlm.convert.parts import build_ola_vlm
from ola_vlm.convert.reference import convert_reference, rename_key
from ola_vlm.convert.reference import main as convert
from ola_vlm.convert.tower import main as convert_tower
from ola_vlm.inference.checkpoints import load_checkpoint
from ola_vlm.modeling_ola_vlm import OlaVlmForConditionalGeneration
from ola_vlm.processing_ola_vlm import OlaVlmProcessor
from ola_vlm.train import train
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.chat_template import END_ANSWERS
from ola_vlm.training.stages import apply_stage

GOLDEN = Path(__file__).parent / "golden"
TOWER = str(GOLDEN / "clip_vit_336")


# Parts


@pytest.mark.parametrize("tied", [False, True])
def test_parts_keep_their_weights(make_model, tiny_parts, tied_parts, tied):
    parts = tied_parts if tied else tiny_parts
    model, processor = make_model(parts=parts)
    llm = AutoModelForCausalLM.from_pretrained(parts.language_model)
    tower = CLIPVisionModel.from_pretrained(parts.vision_tower)
    for name, value in tower.state_dict().items():
        assert model.model.vision_tower.state_dict()[name].equal(value)
    old = llm.get_input_embeddings().weight.data
    for name, value in llm.model.state_dict().items():
        ours = model.model.language_model.state_dict()[name]
        assert (ours[: len(old)] if name == "embed_tokens.weight" else ours).equal(value)
    new = model.get_input_embeddings().weight.data
    assert len(processor.tokenizer) == len(old) + 9 == 43
    assert len(new) == model.config.text_config.vocab_size == 64 == 43 + model.config.vocab_padding
    torch.testing.assert_close(new[model.config.image_token_id], old.mean(0))
    assert new[model.config.task_token_ids].equal(model.task_token_embeddings().data)
    assert model.config.tie_word_embeddings == tied
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    head = model.lm_head.weight.data
    assert head[: len(old)].equal(llm.lm_head.weight.data)
    if not tied:
        torch.testing.assert_close(head[len(old) :], llm.lm_head.weight.data.mean(0).expand(30, -1))
    # text goes through as through the LLM alone
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert model(input_ids=ids).logits[..., : len(old)].allclose(llm(input_ids=ids).logits, atol=1e-5)
    assert model.generation_config.eos_token_id == 2 and model.generation_config.pad_token_id == 0
    assert str(parts.folder) not in json.dumps(model.config.to_dict())


def test_parts_as_objects_and_padded_vocabulary(tiny_parts):
    """An LLM whose table is longer than its tokenizer keeps its size; Phi-3 as LLM, a CLIP pair as tower."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
    llm = Phi3ForCausalLM(Phi3Config(**sizes, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    pair = CLIPModel(
        CLIPConfig(
            vision_config={**sizes, "image_size": 32, "patch_size": 8},
            text_config={**sizes, "vocab_size": 20},
            projection_dim=16,
        )
    )
    folder = tiny_parts.folder / "clip_pair"
    pair.save_pretrained(folder)
    before = {name: value.clone() for name, value in llm.state_dict().items()}
    model, processor = build_ola_vlm(str(folder), llm, tokenizer, tasks=tiny_tasks())
    tower = model.model.vision_tower
    assert tower.embeddings.patch_embedding.weight.equal(pair.vision_model.embeddings.patch_embedding.weight)
    assert model.config.text_config.vocab_size == 64 and llm.config.vocab_size == 64
    assert all(value.equal(before[name]) for name, value in llm.state_dict().items())
    weight, old = model.lm_head.weight.data, before["lm_head.weight"]
    known = len(tokenizer)
    assert weight[:known].equal(old[:known]) and weight[known + 9 :].equal(old[known + 9 :])
    torch.testing.assert_close(weight[known], old[:known].mean(0))
    output = model(**encode(processor, random_rows(2)), output_predictions=True)
    assert output.predictions["seg"][2].shape == (2, 16, 14)


def test_parts_that_do_not_fit(make_model):
    with pytest.raises(ValueError, match=r"tasks\[depth\]\.layers .* from 1 to 4"):
        make_model(tasks=[{"name": "depth"}])
    with pytest.raises(ValueError, match=r"\['image_sise', 'kind'\].* no fields of OlaVlmConfig"):
        make_model(image_sise=32, kind=1, vision_feature_layer=-1)


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
GEMMA2 = {"head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 30.0}  # of logits as small as 0.1
COHERE = {"num_key_value_heads": 2, "logit_scale": 0.0625}
FALCON_H1 = {"num_key_value_heads": 2, "embedding_multiplier": 5.0, "mamba_d_ssm": 32, "mamba_n_heads": 4}
FALCON_H1 |= {"mamba_d_head": 8, "mamba_d_state": 8, "lm_head_multiplier": 1.0}

LLAMA4 = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}
GEMMA4 = {"num_key_value_heads": 2, "head_dim": 8, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Qwen2Config(**SIZES, num_key_value_heads=2, vocab_size=64), None),
        (GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=64, tie_word_embeddings=False), None),
        (
            GraniteConfig(**SIZES, vocab_size=64, logits_scaling=8.0),
            "Granite.* more than a linear head .*'logits_scaling': 8.0",
        ),
        (GraniteConfig(**SIZES, vocab_size=64, embedding_multiplier=12.0, logits_scaling=1.0), None),
        (CohereConfig(**SIZES, **COHERE, vocab_size=64), "Cohere.* more than a linear head .*'logit_scale': 0.0625"),
        (Gemma2Config(**SIZES, **GEMMA2, vocab_size=64), "Gemma2.* linear head .*'final_logit_softcapping': 30.0"),
        (FalconH1Config(**SIZES, **FALCON_H1, vocab_size=64), "FalconH1.* changes embeddings outside of their module"),
        (GemmaConfig(**SIZES, head_dim=8, num_key_value_heads=2, vocab_size=64), None),
        (GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=64), r"GPT2.* ties its head to wte\.weight"),
        (PhiConfig(**SIZES, vocab_size=64), "Phi.* has a bias"),
        (Llama4TextConfig(**SIZES, **LLAMA4, vocab_size=64), None),
        (Gemma4TextConfig(**SIZES, **GEMMA4, vocab_size=64), "Gemma4.* takes no embeddings but those of tokens"),
    ],
)
def test_language_models_keep_their_logits_or_are_refused(tiny_parts, config, message):
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config)
    llm.train()  # with dropout: neither matters to the check nor is changed by it
    if message is not None:
        with pytest.raises(ValueError, match=message):
            build_ola_vlm(tiny_parts.vision_tower, llm, make_tokenizer(), tasks=tiny_tasks())
        return
    model, _ = build_ola_vlm(tiny_parts.vision_tower, llm, make_tokenizer(), tasks=tiny_tasks())
    assert llm.training and not model.training
    ids, known = torch.arange(4, 20)[None], len(make_tokenizer())
    with torch.no_grad():
        ours, own = model(input_ids=ids).logits[..., :known], llm.eval()(input_ids=ids).logits[..., :known]
    torch.testing.assert_close(ours, own)


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_towers_with_and_without_a_class_token(tiny_parts, tmp_path, strategy):
    """SigLIP's has none: every token of it is a patch. CLIP's is left out unless one asks for it."""
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=32, patch_size=8)).save_pretrained(tmp_path)
    siglip = build_ola_vlm(str(tmp_path), tiny_parts.language_model, tasks=tiny_tasks())
    assert siglip[0].config.vision_feature_select_strategy == siglip[1].vision_feature_select_strategy == "full"
    assert siglip[1].num_additional_image_tokens == 0
    overrides = {"tasks": tiny_tasks(), "vision_feature_select_strategy": strategy}
    clip = build_ola_vlm(tiny_parts.vision_tower, tiny_parts.language_model, **overrides)
    for (model, processor), tokens in ((siglip, 16), (clip, 16 + (strategy == "full"))):
        batch = encode(processor, random_rows(2))
        assert (batch["input_ids"] == model.config.image_token_id).sum(1).tolist() == [tokens, tokens]
        output = model(**batch, output_predictions=True)
        assert output.logits.isfinite().all() and output.predictions["seg"][2].shape == (2, 16, 14)


# The reference's checkpoints


def copy_reference(folder: Path, change_weights=None, **config) -> str:
    """The reference checkpoint in `folder` with other config fields and `change_weights` (in place) applied."""
    fields = json.loads((GOLDEN / "reference_checkpoint" / "config.json").read_text()) | config
    weights = load_file(GOLDEN / "reference_checkpoint" / "model.safetensors")
    if change_weights is not None:
        change_weights(weights)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(weights, folder / "model.safetensors")
    return str(folder)


def test_convert_without_tokenizer_writes_the_model_alone(tmp_path, capsys):
    convert([str(GOLDEN / "reference_checkpoint"), str(tmp_path), "--vision-tower", TOWER])
    assert "without --tokenizer" in capsys.readouterr().out
    assert not (tmp_path / "processor_config.json").exists() and not (tmp_path / "tokenizer.json").exists()
    with pytest.raises(SystemExit, match=r"has model\.safetensors already: choose another folder"):
        convert([str(GOLDEN / "reference_checkpoint"), str(tmp_path), "--vision-tower", TOWER])
    with pytest.raises(SystemExit, match=r"has model\.safetensors already: choose another folder"):
        convert_tower([str(GOLDEN / "reference_checkpoint"), str(tmp_path)])
    model = OlaVlmForConditionalGeneration.from_pretrained(tmp_path)
    gen, depth, seg = model.config.tasks
    assert [gen["layers"], depth["layers"], seg["layers"]] == [[2, 4], [1, 3], [2, 3]]
    assert (depth["predictor_dim"], depth["output_mlp"], seg["predictor_dim"]) == (64, True, 56)
    assert model.config.image_token_id == 512 and model.config.task_token_ids == list(range(513, 537))
    reference = load_file(GOLDEN / "reference_checkpoint" / "model.safetensors")
    assert model.queries["seg"].equal(reference["model.special_seg_tokens"])
    assert model.predictors["depth"]["3"].output_mlp[2].bias.equal(reference["image_depth_heads.1.linear_1.2.bias"])
    assert model.get_input_embeddings().weight[:512].equal(reference["model.embed_tokens.weight"])
    means = reference["model.special_depth_tokens"].view(8, 72, 64).mean(1)
    torch.testing.assert_close(model.get_input_embeddings().weight[521:529].data, means)
    original, _, became = convert_reference(str(GOLDEN / "reference_checkpoint"), TOWER)
    assert all(value.equal(model.state_dict()[name]) for name, value in original.state_dict().items())
    dropped = sum(rename_key(key, {"depth": [1, 3]}) is None for key in reference)
    assert dropped and f"{len(reference) - dropped} converted, {dropped} dropped, 0 missing, 0 unknown" in became
    lines = [line.split() for line in became.splitlines()]
    assert sum(int(line[0]) for line in lines[:-1]) == len(reference) == 232
    assert [
        "4",
        "model.layers.*.mlp.up_proj.weight",
        "->",
        "model.language_model.layers.*.mlp.up_proj.weight",
    ] in lines
    assert "image_depth_heads.*.linear_*.*.bias  ->  dropped: a twin of linear_* that got no gradient" in became


def test_convert_with_tokenizer(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "out"
    source, tokenizer = str(GOLDEN / "reference_checkpoint"), str(tmp_path / "tokenizer")
    convert([source, str(out), "--vision-tower", TOWER, "--tokenizer", tokenizer])
    model, processor = OlaVlmForConditionalGeneration.from_pretrained(out), OlaVlmProcessor.from_pretrained(out)
    assert processor.task_token_ids == model.config.task_token_ids == list(range(35, 59))  # free rows of the table
    assert model.config.text_config.vocab_size == 512
    # It has no marks of Llama-3's conversations.
    assert processor.chat_template == make_tokenizer().chat_template
    batch = encode(processor, random_rows(1))
    with torch.no_grad():
        output = model(**batch, output_predictions=True)
    assert output.predictions["depth"][3].shape == (1, 576, 48)


def test_convert_takes_each_tasks_own_weights(tmp_path):
    """The weight of each loss and each task's size are the checkpoint's, in the order of its aux_mode."""
    fields = json.loads((GOLDEN / "reference_checkpoint" / "config.json").read_text())
    weights = {"gen": ("img", 0.2), "depth": ("depth", 0.6), "seg": ("seg", 0.7)}
    changed = {"contrastive_loss_weight": 0.4}
    for name, (prefix, weight) in weights.items():
        changed[f"image_{name}"] = fields[f"image_{name}"] | {f"{prefix}_loss_weight": weight}
    model, _, _ = convert_reference(copy_reference(tmp_path, **changed), TOWER)
    assert {task["name"]: task["loss_weight"] for task in model.config.tasks} == {"gen": 0.2, "depth": 0.6, "seg": 0.7}
    assert [task["contrastive_weight"] for task in model.config.tasks] == [0.4] * 3
    assert [task["target_dim"] for task in model.config.tasks] == [40, 48, 56]
    assert [task["output_mlp"] for task in model.config.tasks] == [False, True, False]
    assert all("text" in task["attends_to"] for task in model.config.tasks)
    model, _, _ = convert_reference(copy_reference(tmp_path, **changed, pass_text_to_aux=False), TOWER)
    assert [task["attends_to"] for task in model.config.tasks] == [["system", "image", "task"]] * 3


def test_convert_a_checkpoint_without_contrastive_loss(tmp_path):
    """It trained no logit scales, and a run that goes on from it has no contrastive loss either."""

    def without_scales(weights):
        for name in [name for name in weights if name.endswith("logit_scale")]:
            del weights[name]

    folder = copy_reference(tmp_path, without_scales, use_contrastive=False)
    model, _, _ = convert_reference(folder, TOWER)
    assert [task["contrastive_weight"] for task in model.config.tasks] == [0.0] * 3
    assert all(scale.item() == 2.0 for scale in model.logit_scales().values())


def test_convert_reads_the_towers_layer_that_the_checkpoint_read(tmp_path):
    model, *_ = convert_reference(copy_reference(tmp_path, mm_vision_select_layer=-3), TOWER)
    assert model.config.vision_feature_layer == -3


def test_convert_finds_the_tower_beside_the_checkpoint(tmp_path):
    shutil.copytree(TOWER, tmp_path / "tiny-clip-vit-336")
    model, *_ = convert_reference(copy_reference(tmp_path / "checkpoint"))
    assert model.config.vision_config.hidden_size == 32


def test_convert_lists_unknown_and_missing_keys(tmp_path):
    def extra(weights):
        weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
        weights["image_seg_heads.0.linear_2.0.weight"] = torch.ones(3)
        weights["image_gen_heads.2.projector.proj_in.bias"] = torch.ones(3)
        weights["sam.backbone.weight"] = torch.ones(3)

    with pytest.raises(SystemExit, match=r"doesn't know \(4\): .*give a whole") as error:
        convert([copy_reference(tmp_path / "extra", extra), str(tmp_path / "out"), "--vision-tower", TOWER])
    for name in ("layers.0.self_attn.q_norm", "image_seg_heads.0.linear_2", "image_gen_heads.2", "sam.backbone"):
        assert name in str(error.value)
    assert "lacks" not in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()

    def fewer(weights):
        del weights["model.special_gen_tokens"], weights["image_depth_heads.1.projector.proj_in.bias"]

    with pytest.raises(ValueError, match=r"lacks weights \(2\): predictors\.depth\.3\.proj_in\.bias, queries\.gen\."):
        convert_reference(copy_reference(tmp_path / "fewer", fewer), TOWER)

    def other_shapes(weights):
        weights["model.special_gen_tokens"] = torch.ones(9, 64)

    with pytest.raises(
        ValueError, match=r"has weights of another shape .*special_gen_tokens \(\(9, 64\) for \(8, 64\)"
    ):
        convert_reference(copy_reference(tmp_path / "shapes", other_shapes), TOWER)
    with pytest.raises(ValueError, match=r"has 512 rows of the vocabulary, its config\.json says 500"):
        convert_reference(copy_reference(tmp_path / "rows", vocab_size=500), TOWER)
    with pytest.raises(ValueError, match=r"config\.json has a field of another type: .*'hidden_size'") as error:
        convert_reference(copy_reference(tmp_path / "type", hidden_size="64"), TOWER)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="names no vision tower, mm_vision_tower is None: give vision_tower"):
        convert_reference(copy_reference(tmp_path / "tower", mm_vision_tower=None))
    with pytest.raises(ValueError, match="files of weights with nothing in them"):
        convert_reference(copy_reference(tmp_path / "nothing", dict.clear), TOWER)
    with pytest.raises(ValueError, match="describes tasks as the reference never does"):
        convert_reference(copy_reference(tmp_path / "tasks", image_seg=None), TOWER)
    with pytest.raises(ValueError, match="model_type is 'mamba'"):
        convert_reference(copy_reference(tmp_path / "other", model_type="mamba"), TOWER)
    (tmp_path / "extra" / "model.safetensors").rename(tmp_path / "extra" / "weights.bin")
    with pytest.raises(ValueError, match=r"no \*\.safetensors and no pytorch_model"):
        convert_reference(tmp_path / "extra", TOWER)


def test_convert_drops_only_what_is_listed():
    layers = {"depth": [1, 3]}
    assert rename_key("image_depth_heads.0.linear_2.0.weight", layers) is None
    assert rename_key("image_depth_heads.1.linear_3.2.bias", layers) is None
    assert rename_key("da_v2_head.depth_head.projects.0.bias", layers) is None
    assert rename_key("image_depth_heads.1.linear_1.2.bias", layers) == "predictors.depth.3.output_mlp.2.bias"


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_convert_reads_shards(tmp_path, suffix):
    folder = Path(copy_reference(tmp_path / "shards"))
    weights, stem = load_file(folder / "model.safetensors"), "model" if suffix == "safetensors" else "pytorch_model"
    (folder / "model.safetensors").unlink()
    save = save_file if suffix == "safetensors" else torch.save
    for i, names in enumerate([list(weights)[::2], list(weights)[1::2]], 1):
        save({name: weights[name] for name in names}, folder / f"{stem}-0000{i}-of-00002.{suffix}")
    whole, *_ = convert_reference(str(GOLDEN / "reference_checkpoint"), TOWER)
    model, *_ = convert_reference(str(folder), TOWER)
    assert all(value.equal(model.state_dict()[name]) for name, value in whole.state_dict().items())
    if suffix == "bin":  # no code of a pickle runs
        torch.save({"model.norm.weight": Path("a")}, folder / "pytorch_model-00002-of-00002.bin")
        with pytest.raises(SystemExit, match=r"ola-vlm convert: .*Weights only load failed"):
            convert([str(folder), str(tmp_path / "out"), "--vision-tower", TOWER])


def test_convert_with_a_convnext(tmp_path):
    """As the reference names and reads it: the trunk of open_clip, its last map; then transformers' FastVLM."""
    torch.manual_seed(0)
    seen = {"input_size": [3, 128, 128], "mean": [0.4] * 3, "std": [0.2] * 3}
    tower = TimmWrapperModel(TimmWrapperConfig(architecture="convnext_atto", do_pooling=False, pretrained_cfg=seen))
    tower.eval().save_pretrained(tmp_path / "tower")
    trunk = {f"model.vision_tower.vision_tower.{k}": v for k, v in tower.timm_model.state_dict().items()}

    def convnext(weights):
        for name in [name for name in weights if name.startswith("model.vision_tower.")]:
            del weights[name]
        weights.update(trunk, **{"model.mm_projector.0.weight": torch.randn(64, 320)})

    name = "laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup-res768"
    source = copy_reference(tmp_path / "checkpoint", convnext, mm_vision_tower=name)
    with pytest.raises(ValueError, match="is a ConvNeXt: give vision_tower"):
        convert_reference(source)
    make_tokenizer().save_pretrained(tmp_path / "words")
    model, processor, became = convert_reference(source, str(tmp_path / "tower"), str(tmp_path / "words"))
    assert "model.vision_tower.vision_tower.stem.*.weight  ->  model.vision_tower.timm_model.stem.*.weight" in became
    assert (processor.patch_size, processor.num_additional_image_tokens) == (32, 0)
    batch = encode(processor, random_rows(2))
    assert (batch["input_ids"] == model.config.image_token_id).sum(1).tolist() == [16, 16]
    with torch.no_grad():
        features = tower.timm_model.forward_features(batch["pixel_values"]).flatten(2).transpose(1, 2)
        expected = model.model.multi_modal_projector(features)
        torch.testing.assert_close(
            torch.stack(model.get_image_features(batch["pixel_values"]).pooler_output), expected
        )
        assert export_llava(model)(**batch).logits.equal(model(**batch).logits)


PHI3_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
PHI3_SIZES |= {"num_hidden_layers": 4, "vocab_size": 512, "pad_token_id": 0}


def phi3_weights(language_model: Phi3ForCausalLM | None = None):
    """A change of the reference checkpoint's weights: a Phi-3 in the place of its Llama."""
    torch.manual_seed(0)
    checkpoint = {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    language_model = language_model or Phi3ForCausalLM(Phi3Config(**PHI3_SIZES, **checkpoint))
    phi3 = {name: value.clone() for name, value in language_model.state_dict().items()}

    def change(weights):
        for name in list(weights):
            if name.startswith(("model.layers.", "model.norm.", "model.embed_tokens.", "lm_head.")):
                del weights[name]
        weights.update(phi3)

    return change


def test_convert_phi3(tmp_path):
    """The same key table; Phi-3's fused projections keep transformers' names."""
    torch.manual_seed(0)
    checkpoint = {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    llm = Phi3ForCausalLM(Phi3Config(**PHI3_SIZES, **checkpoint)).eval()
    source = copy_reference(tmp_path / "phi3", phi3_weights(llm), model_type="ola_phi3", **PHI3_SIZES)
    model, *_ = convert_reference(source, TOWER)
    assert model.model.language_model.layers[0].self_attn.qkv_proj.weight.shape == (192, 64)
    ids = torch.arange(4, 84)[None]
    with torch.no_grad():
        assert model(input_ids=ids).logits[..., :512].equal(llm(input_ids=ids).logits)


# Marks of the reference's conversations.
MARKS = {
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
}


def copy_reference_of(language_model: str, folder: Path) -> tuple[str, dict[str, int]]:
    """The reference checkpoint with a Llama-3 or a Phi-3, and its tokenizer's ids, by which a turn ends otherwise than
    a text."""
    if language_model == "phi3":
        source = copy_reference(folder, phi3_weights(), model_type="ola_phi3", **PHI3_SIZES)
    else:
        source = copy_reference(folder)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(MARKS[language_model], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return source, tokenizer.get_vocab()


@pytest.mark.parametrize("language_model", list(MARKS))
def test_a_converted_checkpoint_is_asked_by_the_prompt_that_it_was_trained_with(tmp_path, language_model):
    source, _ = copy_reference_of(language_model, tmp_path)
    convert([source, str(tmp_path / "out"), "--vision-tower", TOWER])
    processor = OlaVlmProcessor.from_pretrained(tmp_path / "out")
    golden = json.loads((GOLDEN / "h_prompts.json").read_text())[f"{language_model}.caption"]["prompt"]
    question = {"type": "text", "text": "Render a clear and concise summary of the photo."}
    messages = [{"role": "user", "content": [{"type": "image"}, question]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    expected, _, _ = golden.partition("select luxury furniture")
    # Llama-3's first token, which the reference leaves to the tokenizer.
    assert prompt.removeprefix("<s>") == expected


@pytest.mark.parametrize("language_model", list(MARKS))
def test_a_converted_checkpoint_stops_at_the_end_of_its_turn(tmp_path, language_model):
    source, ids = copy_reference_of(language_model, tmp_path)
    end = ids[MARKS[language_model][-1]]
    # config.json and the tokenizer name the end of a text alone.
    model, *_ = convert_reference(source, TOWER)
    assert model.generation_config.eos_token_id == [2, end]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9, end]}))
    convert([source, str(tmp_path / "out"), "--vision-tower", TOWER])
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [2, 9, end]


def test_convert_reads_the_ends_of_the_generation_config(tmp_path):
    source = copy_reference(tmp_path)
    for ends, expected in ((7, [2, 7]), (2, 2), (None, 2), ([7, 2], [2, 7])):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        model, *_ = convert_reference(source, TOWER)
        assert model.generation_config.eos_token_id == expected
        assert (model.generation_config.bos_token_id, model.generation_config.pad_token_id) == (1, 0)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ["</s>"]}))
    with pytest.raises(ValueError, match=r"generation_config\.json has the eos_token_id \['</s>'\]: it must be"):
        convert_reference(source, TOWER)


@pytest.mark.parametrize(("ratio", "has_sides"), [("pad", True), ("square", False), (None, False)])
def test_convert_makes_pictures_square_as_the_reference_did(tmp_path, ratio, has_sides):
    make_tokenizer().save_pretrained(tmp_path)
    _, processor, _ = convert_reference(copy_reference(tmp_path, image_aspect_ratio=ratio), TOWER)
    picture = Image.new("RGB", (60, 20), "red")
    picture.paste("blue", (20, 0, 40, 20))
    # (3, 336, 336)
    (pixels,) = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    side = pixels[:, 168, 40]
    middle = pixels[:, 168, 168]
    assert side.allclose(middle) != has_sides


def test_convert_refuses_another_way_of_making_pictures_square(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="image_aspect_ratio 'anyres': ours are pad and square, set it to one"):
        convert_reference(copy_reference(tmp_path, image_aspect_ratio="anyres"), TOWER)


# Its released kinds


def instruction_tuned(weights: dict) -> None:
    """As those of its README: no heads, no logit scales, no teacher's decoder; the task tokens' tables stay."""
    for name in list(weights):
        if name.startswith(("image_", "da_v2_head.")) or name.endswith("_logit_scale"):
            del weights[name]


@pytest.mark.parametrize("language_model", ["llama", "phi3"])
@torch.no_grad()
def test_convert_an_instruction_tuned_checkpoint(tmp_path, language_model, capsys):
    """Answers are those of the same weights with predictors, which are absent and said to be."""
    changes, sizes = [], {}
    if language_model == "phi3":
        changes, sizes = [phi3_weights()], PHI3_SIZES

    def only_model(weights):
        for change in changes:
            change(weights)

    def tuned(weights):
        only_model(weights)
        instruction_tuned(weights)

    whole_folder = copy_reference(tmp_path / "whole", only_model, model_type=f"ola_{language_model}", **sizes)
    folder = copy_reference(tmp_path / "tuned", tuned, model_type=f"llava_{language_model}", **sizes)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)  # where the reference saves it, too
    whole, *_ = convert_reference(whole_folder, TOWER, folder)
    convert([folder, str(tmp_path / "out"), "--vision-tower", TOWER])
    said = capsys.readouterr().out
    assert "absent: predictors and logit scales" in said and "0 dropped, 0 missing, 0 unknown" in said
    assert "model.special_depth_tokens  ->  its groups' means, the task tokens' rows of the vocabulary" in said

    model, info = OlaVlmForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not model.config.has_predictors and [task["name"] for task in model.config.tasks] == ["gen", "depth", "seg"]
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert not [name for name in names if name.startswith(("predictors", "queries", "logit_scales"))]
    _, processor = load_checkpoint(tmp_path / "out")
    assert processor.task_token_ids == model.config.task_token_ids == list(range(35, 59))
    batch = encode(processor, random_rows(2))
    logits = model.eval()(**batch, output_predictions=True)
    assert logits.logits.equal(whole(**batch).logits) and not logits.predictions
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert plain(**batch).logits.equal(logits.logits)
    assert export_llava(model)(**batch).logits.equal(logits.logits)
    with pytest.raises(ValueError, match="the checkpoint has none: take finetune"):
        apply_stage(model, "pretrain")
    assert apply_stage(model, "finetune").task_tokens == "frozen"


def test_convert_without_the_tables_of_task_tokens(tmp_path):
    def less(weights):
        instruction_tuned(weights)
        del weights["model.special_seg_tokens"]

    with pytest.raises(ValueError, match=r"lacks the tables of task tokens, model\.special_seg_tokens: give a whole"):
        convert_reference(copy_reference(tmp_path / "tuned", less, model_type="llava_llama"), TOWER)


def test_convert_drops_the_teachers_inside(tmp_path):
    """As pre-training saves them: frozen modules of the model; and buffers of older versions of transformers."""
    teachers = {
        "dav2_backbone.pretrained.blocks.0.norm1.weight": torch.ones(2),
        "dav2_backbone.depth_head.projects.0.bias": torch.ones(2),
        "oneformer.model.pixel_level_module.encoder.embeddings.norm.weight": torch.ones(2),
        "gen_encoder.vision_model.embeddings.class_embedding": torch.ones(2),
        "pipe.image_encoder.vision_model.embeddings.class_embedding": torch.ones(2),
    }
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.rotary_emb.inv_freq": torch.ones(8),
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(577)[None],
    }
    whole, *_ = convert_reference(str(GOLDEN / "reference_checkpoint"), TOWER)
    source = copy_reference(tmp_path / "pretrain", lambda weights: weights.update(**teachers, **buffers))
    model, _, became = convert_reference(source, TOWER)
    assert all(value.equal(model.state_dict()[name]) for name, value in whole.state_dict().items())
    assert "5 of the dropped are the frozen teachers'" in became
    assert "oneformer.model.pixel_level_module.encoder.embeddings.norm.weight  ->  dropped: a frozen teacher" in became
    assert became.count("dropped: a buffer, which is computed") == 3


def test_convert_keeps_bfloat16(tmp_path):
    """Also where heads or logit scales are kept in another type."""

    def half(weights):
        for name, value in weights.items():
            if not name.startswith(("depth_logit_scale", "image_gen")):
                weights[name] = value.to(torch.bfloat16)

    source = copy_reference(tmp_path / "half", half, torch_dtype="bfloat16")
    convert([source, str(tmp_path / "out"), "--vision-tower", TOWER])
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in kept.values()} == {torch.bfloat16}
    assert OlaVlmForConditionalGeneration.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def indexed(folder: Path, suffix: str) -> list[Path]:
    """The reference checkpoint in three shards with an index, as it is released."""
    weights = load_file(Path(copy_reference(folder)) / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    save = save_file if suffix == "safetensors" else torch.save
    files = [folder / f"{stem}-0000{i}-of-00003.{suffix}" for i in (1, 2, 3)]
    weight_map = {}
    for i, file in enumerate(files):
        names = list(weights)[i::3]
        save({name: weights[name] for name in names}, file)
        weight_map.update(dict.fromkeys(names, file.name))
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12345\n"


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_convert_says_what_is_wrong_with_the_files(tmp_path, suffix):
    files = indexed(tmp_path / "shards", suffix)
    whole, *_ = convert_reference(str(GOLDEN / "reference_checkpoint"), TOWER)
    model, *_ = convert_reference(tmp_path / "shards", TOWER)
    assert all(value.equal(model.state_dict()[name]) for name, value in whole.state_dict().items())

    def refused(message: str) -> None:
        with pytest.raises(SystemExit, match=message) as error:
            convert([str(tmp_path / "shards"), str(tmp_path / "out"), "--vision-tower", TOWER])
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    content = files[1].read_bytes()
    files[1].write_bytes(content[: len(content) // 2])
    refused(rf"{files[1].name}: it is damaged or half fetched")
    files[1].write_text(LFS)
    refused(rf"{files[1].name} is a Git LFS pointer.*`git lfs pull`")
    files[1].unlink()
    refused(rf"lacks {files[1].name}, which .*index\.json names")
    next((tmp_path / "shards").glob("*.index.json")).unlink()
    refused(rf"lacks {files[1].name}: fetch the whole checkpoint")
    (tmp_path / "shards" / "non_lora_trainables.bin").touch()
    refused("is a LoRA, which needs its base model: merge")


def test_convert_takes_no_path_from_the_configuration(tmp_path):
    source = copy_reference(tmp_path / "checkpoint", mm_vision_tower="/home/someone/clip")
    with pytest.raises(ValueError, match="is /home/someone/clip, a path of another machine: give vision_tower"):
        convert_reference(source)
    config = json.loads((Path(source) / "config.json").read_text())
    del config["image_seg"]
    (Path(source) / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json lacks 'image_seg'"):
        convert_reference(source, TOWER)
    (Path(source) / "config.json").write_text(json.dumps({"model_type": {"name": "ola_llama"}}))
    with pytest.raises(ValueError, match=r"model_type is \{'name': 'ola_llama'\}: only"):
        convert_reference(source, TOWER)


# Plain LLaVA


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_export_is_llava_with_the_same_logits(make_model, tiny_parts, tied_parts, tmp_path, tied, capsys):
    model, processor = make_model(parts=tied_parts if tied else tiny_parts)
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    export([str(tmp_path / "ours"), str(tmp_path / "plain")])
    assert "Wrote model and processor" in capsys.readouterr().out
    fields = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert fields["model_type"] == "llava" and fields["architectures"] == ["LlavaForConditionalGeneration"]
    assert not {"tasks", "task_token_ids", "auto_map"} & set(fields)
    assert not list((tmp_path / "plain").glob("*.py"))
    written = {path.name: path.read_text() for path in (tmp_path / "plain").glob("*.json")}
    assert {"config.json", "processor_config.json", "tokenizer_config.json"} <= set(written)
    assert not [name for name, text in written.items() if "auto_map" in text or "ola_vlm" in text.lower()]
    plain, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    names = load_file(tmp_path / "plain" / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"language_model", "vision_tower", "multi_modal_projector"}

    rows = random_rows(3, [1, 2, 0])
    batch = encode(processor, rows)
    assert plain.eval()(**batch).logits.equal(model(**batch).logits)
    assert plain.generation_config.suppress_tokens == model.suppressed_token_ids
    plain_processor = LlavaProcessor.from_pretrained(tmp_path / "plain")
    again = encode(plain_processor, rows)
    assert again["input_ids"].equal(batch["input_ids"]) and again["pixel_values"].equal(batch["pixel_values"])
    # and the plain class reads our own folder
    direct = LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert direct.eval()(**batch).logits.equal(model(**batch).logits)


@pytest.mark.parametrize("command", [export, convert_tower])
def test_a_folder_that_is_not_there_is_said_so(tmp_path, command):
    with pytest.raises(SystemExit, match=r"there is no folder .*nowhere"):
        command([str(tmp_path / "nowhere"), str(tmp_path / "out")])


def test_export_without_processor(make_model, tmp_path, capsys):
    model, _ = make_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "ours")
    export([str(tmp_path / "ours"), str(tmp_path / "plain")])
    assert "no processor" in capsys.readouterr().out
    assert load_file(tmp_path / "plain" / "model.safetensors")["language_model.lm_head.weight"].dtype == torch.bfloat16


# A plain LLaVA as a start

LLAVA_HF_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' : ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant :' }}{% endif %}"
)


def test_llava_of_the_hub_is_a_start_for_finetuning(make_model, tmp_path):
    """In the layout of llava-hf's LLaVA-1.5: no task, CLIP's own image processor, a padded vocabulary, shards."""
    ours, processor = make_model(tasks=[])
    plain = export_llava(ours)
    plain.resize_token_embeddings(64, mean_resizing=False)
    crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    names = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    parts = CLIPImageProcessor(**crop), processor.tokenizer
    llava_processor = LlavaProcessor(*parts, chat_template=LLAVA_HF_TEMPLATE, **names)
    plain.save_pretrained(tmp_path / "hub", max_shard_size="60KB")
    llava_processor.save_pretrained(tmp_path / "hub")
    data = write_llava(tmp_path, [llava_sample(0), llava_sample(1, None)], ["a.png"])
    fields = {"stage": "finetune", "checkpoint": str(tmp_path / "hub"), "data": str(data), "max_steps": 1}
    fields |= {"per_device_train_batch_size": 2, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}

    trainer = train(OlaVlmArguments(str(tmp_path / "out"), learning_rate=0.0, **fields))
    assert trainer.model.config.tasks == [] and trainer.state.log_history[-1]["train_loss"] > 0
    batch = encode(llava_processor, random_rows(2))
    again, theirs = OlaVlmProcessor.from_pretrained(tmp_path / "out"), dict(batch)
    assert again.chat_template == END_ANSWERS + LLAVA_HF_TEMPLATE  # which has no end of turn
    again.chat_template = LLAVA_HF_TEMPLATE
    assert all(encode(again, random_rows(2))[name].equal(value) for name, value in theirs.items())
    with torch.no_grad():
        assert trainer.model.eval()(**batch).logits.equal(plain(**batch).logits)
    moved = train(OlaVlmArguments(str(tmp_path / "moved"), learning_rate=0.01, **fields)).model
    assert not moved.lm_head.weight.equal(plain.lm_head.weight)
    assert moved.model.vision_tower.state_dict().keys() == plain.model.vision_tower.state_dict().keys()
    (shard,) = [path for path in (tmp_path / "hub").glob("*.safetensors") if "norm" in str(load_file(path).keys())][:1]
    save_file({name: value for name, value in load_file(shard).items() if "norm" not in name}, shard, {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no weights for .*norm\.weight.*: give a whole checkpoint"):
        train(OlaVlmArguments(str(tmp_path / "less"), **fields))
