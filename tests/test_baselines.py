"""baselines/: the multi-encoder LLaVA. Its features are the teachers' own, and it runs wherever ours does."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import encode, random_image, random_rows
from safetensors.torch import load_file
from test_remote_code import run_without_the_package
from tiny_teachers import save_tiny_teachers
from torch.nn import functional as F
from training_helpers import IMAGES, Interrupt, llava_sample, losses, make_trainer, weights, write_llava
from transformers import GenerationConfig

from ola_vlm import cli
from ola_vlm.baselines.build import build_multi_encoder, load_encoders
from ola_vlm.baselines.configuration_multi_encoder import MultiEncoderLlavaConfig
from ola_vlm.baselines.modeling_multi_encoder import MultiEncoderLlavaForConditionalGeneration
from ola_vlm.convert.parts import build_ola_vlm
from ola_vlm.inference.checkpoints import classes_of, read_fields
from ola_vlm.inference.generate import generate_answers
from ola_vlm.miniature import study
from ola_vlm.modeling_ola_vlm import OlaVlmForConditionalGeneration
from ola_vlm.probing.fit import batches, fit
from ola_vlm.probing.probes import score
from ola_vlm.probing.ridge import RidgeFit
from ola_vlm.probing.states import StateReader
from ola_vlm.recipes import RECIPES
from ola_vlm.recipes.paper import FUSIONS as METHODS
from ola_vlm.targets.encoders import open_image
from ola_vlm.train import train
from ola_vlm.training.arguments import OlaVlmArguments

FUSIONS = list(METHODS.values())
GRID, TOKENS = 16, 2  # the base encoder's positions; each other encoder's tokens
ORDER = ["gen", "depth", "seg"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, dict]:
    """Entries of a recipe's `teachers`."""
    kinds = dict(zip(ORDER, ["clip_image", "depth_anything", "oneformer"], strict=True))
    paths = save_tiny_teachers(tmp_path_factory.mktemp("teachers"))
    return {name: {"encoder": kind, "path": str(paths[kind])} for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def encoders(teachers):
    return load_encoders(teachers, GRID)


@pytest.fixture(scope="module")
def make(encoders, tiny_parts):
    """Function (fusion, parts) -> a baseline, its processor, and the plain LLaVA that it was made of."""

    def build(fusion: str, parts=tiny_parts, **options) -> SimpleNamespace:
        torch.manual_seed(0)
        llava, processor = build_ola_vlm(parts.vision_tower, parts.language_model, **options)
        model, own = build_multi_encoder(llava, processor, encoders, fusion, TOKENS)
        return SimpleNamespace(model=model, processor=own, llava=llava, llava_processor=processor)

    return build


def image_tokens(model, pixel_values) -> torch.Tensor:
    return torch.stack(model.model.get_image_features(pixel_values).pooler_output)


def test_features_are_the_target_encoders(make, encoders):
    """Of every image, wide or narrow: each encoder gets the pixels of its own preprocessing."""
    made = make("token")
    images = [random_image(i, size) for i, size in enumerate([(32, 32), (90, 30), (41, 64)])]
    pixel_values = made.processor(images=images, return_tensors="pt")["pixel_values"]
    base, *views = made.model.model.views(pixel_values)
    assert base.equal(made.llava_processor.image_processor(images, return_tensors="pt")["pixel_values"])
    assert list(made.model.model.encoders) == list(encoders) == ORDER
    for (name, encoder), view in zip(encoders.items(), views, strict=True):
        features, target = made.model.model.encoders[name](view), encoder(images)
        assert features.shape == target.shape and target.std() > 0
        torch.testing.assert_close(features, target, rtol=0, atol=1e-5)
    with pytest.raises(AssertionError):  # the teachers don't see what the base encoder sees
        torch.testing.assert_close(made.model.model.encoders["depth"](base), encoders["depth"](images))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_fusion_is_the_papers(make, encoders, fusion):
    made, images = make(fusion), [random_image(1), random_image(2)]
    model, pixel_values = made.model, made.processor(images=images, return_tensors="pt")["pixel_values"]
    base = model.model.vision_tower(model.model.views(pixel_values)[0], output_hidden_states=True).hidden_states[-2]
    gen, depth, seg = (encoder(images) for encoder in encoders.values())
    if fusion == "feature":
        joined = torch.cat([base[:, 1:], gen.repeat(1, GRID, 1), depth, seg], dim=-1)
        expected = model.model.multi_modal_projector(joined)
    else:
        projectors = model.model.encoder_projectors
        parts = [projectors["gen"](gen).repeat(1, TOKENS, 1)]
        parts += [projectors["depth"](depth.unflatten(1, (TOKENS, -1)).mean(2))]
        parts += [projectors["seg"](seg.unflatten(1, (TOKENS, -1)).mean(2))]
        expected = torch.cat([model.model.multi_modal_projector(base[:, 1:]), *parts], dim=1)
    torch.testing.assert_close(image_tokens(model, pixel_values), expected, rtol=1e-5, atol=1e-6)
    count = GRID + (3 * TOKENS if fusion == "token" else 0)
    assert expected.shape[1] == count == model.config.num_image_tokens
    ids = encode(made.processor, random_rows(1))["input_ids"]
    assert (ids == model.config.image_token_id).sum() == count


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_it_starts_as_llava(make, tiny_parts, tied_parts, tied):
    """Feature: without the encoders' channels, its logits are LLaVA's. Token: its grid's tokens are LLaVA's."""
    parts, rows = tied_parts if tied else tiny_parts, random_rows(3, [1, 2, 0])
    made = make("feature", parts)
    inputs, plain = encode(made.processor, rows), encode(made.llava_processor, rows)
    expected = made.llava(**plain).logits
    assert not made.model(**inputs).logits.allclose(expected, atol=1e-4)
    made.model.model.multi_modal_projector.linear_1.weight[:, 32:] = 0
    torch.testing.assert_close(made.model(**inputs).logits, expected)
    made = make("token", parts)
    grid = image_tokens(made.model, inputs["pixel_values"])[:, :GRID]
    torch.testing.assert_close(grid, image_tokens(made.llava, plain["pixel_values"]))
    assert (made.model.lm_head.weight is made.model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("stage", ["pretrain", "visual_pretrain", "finetune"])
def test_what_trains_and_what_stays(make, tmp_path, fusion, stage):
    made = make(fusion)
    rows = random_rows(8, IMAGES[:4] + [0] * 4)  # the second step has no image at all
    sequential = {"train_sampling_strategy": "sequential", "weight_decay": 0.1}
    before = weights(made.model)
    options = {"stage": stage, "per_device_train_batch_size": 4, **sequential}
    trainer = make_trainer(made.model, made.processor, tmp_path, rows, **options)
    trainer.train()
    assert [sorted(step) for step in losses(trainer)] == [["loss", "loss/ntp"]] * 2
    assert made.model.training and made.model.model.language_model.training
    assert not any(parameter.requires_grad for parameter in made.model.model.encoders.parameters())
    assert not any(part.training for encoder in made.model.model.encoders.values() for part in encoder.modules())
    trained = {"pretrain": {"projector"}, "visual_pretrain": {"projector", "language_model", "vision_tower"}}
    trained["finetune"] = {"projector", "language_model"}
    parts = {"multi_modal_projector": "projector", "encoder_projectors": "projector", "lm_head": "language_model"}
    moved = {part: [] for part in ("projector", "language_model", "vision_tower", "encoders")}
    for name, value in weights(made.model).items():
        part = name.split(".")[0 if name.startswith("lm_head") else 1]
        moved[parts.get(part, part)].append(not value.equal(before[name]))
    for part, of_part in moved.items():
        assert (any if part in trained[stage] else not_any)(of_part), part
    if fusion == "token":
        assert all(moved["projector"]) and len(moved["projector"]) == 16


def not_any(values) -> bool:
    return not any(values)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_logits_only_where_supervised_give_the_same_loss(make, fusion):
    made = make(fusion)
    inputs, gradients, losses = encode(made.processor, random_rows(3, [1, 0, 2])), {}, {}
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == made.model.config.image_token_id, -100)
    for few in (False, True):
        output = made.model(**inputs, labels=labels, supervised_logits_only=few, num_items_in_batch=7)
        output.loss.backward()
        losses[few], gradients[few] = output.loss, made.model.model.multi_modal_projector.linear_1.weight.grad.clone()
        made.model.zero_grad()
    assert output.logits.shape == ((labels[:, 1:] != -100).sum(), made.model.config.text_config.vocab_size)
    torch.testing.assert_close(losses[True], losses[False])
    torch.testing.assert_close(gradients[True], gradients[False])
    with pytest.raises(ValueError, match="pass labels"):
        made.model(**inputs, supervised_logits_only=True)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_loss_is_llavas_and_reaches_every_projector_without_images(make, fusion):
    made = make(fusion)
    inputs = encode(made.processor, random_rows(2, 0))
    inputs["pixel_values"] = made.processor(images=[random_image(0)], return_tensors="pt")["pixel_values"][:0]
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    output = made.model(**inputs, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    projectors = [value for name, value in made.model.named_parameters() if "projector" in name]
    assert all(value.grad is not None and not value.grad.any() for value in projectors)


@torch.no_grad()
@pytest.mark.parametrize("fusion", FUSIONS)
def test_generation_does_not_depend_on_batch_mates(make, fusion):
    made, rows = make(fusion), random_rows(4, [1, 0, 2, 1])
    for row in rows:
        row["messages"] = row["messages"][:1]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "output_logits": True}
    options["return_dict_in_generate"] = True
    together = made.model.generate(**encode(made.processor, rows, "left"), **options)
    for i, row in enumerate(rows):
        alone = made.model.generate(**encode(made.processor, [row], "left"), **options)
        assert alone.sequences[0, -6:].equal(together.sequences[i, -6:])
        torch.testing.assert_close(alone.logits[0][0], together.logits[0][i], rtol=1e-4, atol=1e-4)
        assert made.model.config.image_token_id not in alone.sequences[0, -6:]


@torch.no_grad()
@pytest.mark.parametrize("fusion", FUSIONS)
def test_it_never_emits_an_image_token(make, fusion):
    made, row = make(fusion), random_rows(1)[0]
    row["messages"] = row["messages"][:1]
    inputs, image_id = encode(made.processor, [row], "left"), made.model.config.image_token_id
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def answer(*args, **more) -> list[int]:
        return made.model.generate(*args, **inputs, **more)[0, inputs["input_ids"].shape[1] :].tolist()

    expected = answer(**options)
    made.model.lm_head.weight[image_id] = 3 * made.model.lm_head.weight[expected[0]]  # it would come first
    assert answer(**options, suppress_tokens=[0])[0] == image_id
    assert image_id not in answer(**options)
    assert image_id not in answer(generation_config=GenerationConfig(**options))
    assert image_id in made.model.generation_config.suppress_tokens  # which goes with the checkpoint
    # Nor what the model's own configuration bans beside it.
    made.model.generation_config.suppress_tokens = [image_id, expected[0]]
    for more in (options, {"generation_config": GenerationConfig(**options)}):
        assert not {image_id, expected[0]} & set(answer(**more))
    # Nor rows that stand for no token.
    rows, padding = made.model.config.text_config.vocab_size, made.llava.config.vocab_padding
    assert padding > 0
    made.model.lm_head.weight[-1] = 4 * made.model.lm_head.weight[expected[0]]
    assert answer(**options, suppress_tokens=[0])[0] == rows - 1
    assert max(answer(**options)) < rows - padding


@torch.no_grad()
def test_a_resized_vocabulary_has_its_new_tokens(make, tmp_path):
    """They may be answered, here and where the model is loaded again."""
    made = make(FUSIONS[0])
    model, processor = made.model, made.processor
    tokens = len(processor.tokenizer)
    model.resize_token_embeddings(tokens, pad_to_multiple_of=64)
    assert model.config.vocab_padding > 1 and tokens in model.generation_config.suppress_tokens
    model.generation_config.suppress_tokens.append(3)
    model.resize_token_embeddings(tokens + 1)
    model.save_pretrained(tmp_path)
    for resized in (model, MultiEncoderLlavaForConditionalGeneration.from_pretrained(tmp_path)):
        assert resized.config.vocab_padding == 0 and resized.lm_head.weight.shape[0] == tokens + 1
        assert resized.suppressed_token_ids == [processor.image_token_id]
        assert sorted(resized.generation_config.suppress_tokens) == sorted([processor.image_token_id, 3])


@pytest.mark.parametrize("fusion", FUSIONS)
def test_saved_and_loaded(make, tied_parts, tmp_path, fusion):
    for name, parts in (("untied", {}), ("tied", {"parts": tied_parts})):
        made, folder = make(fusion, **parts), tmp_path / name
        made.model.save_pretrained(folder)
        made.processor.save_pretrained(folder)
        model_class, processor_class = classes_of(folder, read_fields(folder))
        model, report = model_class.from_pretrained(folder, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        rows = random_rows(2, [1, 2])
        inputs, again = (encode(one, rows) for one in (made.processor, processor_class.from_pretrained(folder)))
        assert all(again[key].equal(value) for key, value in inputs.items())
        assert model(**again).logits.equal(made.model(**inputs).logits)
        assert not any("config" in name for name in load_file(folder / "model.safetensors"))
    half = model_class.from_pretrained(folder, dtype=torch.bfloat16)
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}
    assert half(**again).logits.isfinite().all()
    assert str(tied_parts.folder) not in (folder / "config.json").read_text()


SCRIPT = """
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

folder, batch = sys.argv[1], torch.load(sys.argv[2])
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(processor).__name__ == "MultiEncoderLlavaProcessor"
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == type(model).__name__
content = [{"type": "image", "image": Image.new("RGB", (60, 20), "red")}, {"type": "text", "text": " what is this ?"}]
messages = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
assert inputs["pixel_values"].equal(batch["pixel_values"])
with torch.no_grad():
    torch.testing.assert_close(model(**inputs).logits, batch["logits"])
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
print(pipe(messages, max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"])
model.save_pretrained(sys.argv[3])
again = AutoModelForImageTextToText.from_pretrained(sys.argv[3], trust_remote_code=True).eval()
with torch.no_grad():
    torch.testing.assert_close(again(**inputs).logits, batch["logits"])
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("fusion", FUSIONS)
def test_remote_code_in_a_fresh_process(make, tmp_path, fusion):
    made, folder = make(fusion), tmp_path / "checkpoint"
    made.model.save_pretrained(folder)
    made.processor.save_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " what is this ?"}]}]
    text = made.processor.apply_chat_template(messages, add_generation_prompt=True)
    red = open_image(random_image(0, (60, 20)).point(lambda value: 0))
    red.paste("red", (0, 0, *red.size))
    inputs = made.processor(text=text, images=red, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        batch = {"pixel_values": inputs["pixel_values"], "logits": made.model(**inputs).logits}
    torch.save(batch, tmp_path / "batch.pt")
    assert run_without_the_package(SCRIPT, tmp_path, folder, tmp_path / "batch.pt", tmp_path / "again") == "done"


@pytest.mark.parametrize("fusion", FUSIONS)
def test_probed_and_asked_like_ours(make, encoders, tmp_path, fusion):
    made, images = make(fusion), [random_image(i) for i in range(6)]
    targets = {"depth": encoders["depth"], "gen": encoders["gen"]}
    reader = StateReader(made.model, made.processor)
    states = reader(images[:2])  # the base encoder's grid, without the others' tokens
    assert all(states.of_grid(layer).shape == (2, GRID, 32) for layer in range(states.num_layers))
    tasks = [{"name": n, "target_length": t.target_length, "target_dim": t.target_dim} for n, t in targets.items()]
    fitter = RidgeFit(tasks, states.num_layers, 32)
    fit(fitter, reader, targets, images[:4])
    scores, _ = score(batches(reader, targets, images[4:], 2), {0: fitter.solve(dict.fromkeys(targets, 1e-3))})
    assert {task: list(layers) for task, layers in scores[0].items()} == {task: list("01234") for task in targets}
    images[0].save(tmp_path / "0.png")
    question = {"id": "0", "image": "0.png", "question": "what is this ?", "choices": ["a", "b"], "task": "t"}
    (answer,) = generate_answers(made.model, made.processor, [question], tmp_path)
    assert isinstance(answer["output"], str)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_parts, teachers):
    """Fields of a run on 6 images."""
    folder = tmp_path_factory.mktemp("data")
    names = [f"{i}.png" for i in range(6)]
    data = write_llava(folder, [llava_sample(i, name) for i, name in enumerate(names)], names)
    fields = {"vision_tower": tiny_parts.vision_tower, "language_model": tiny_parts.language_model}
    fields |= {"teachers": teachers, "num_encoder_tokens": TOKENS, "data": str(data), "max_steps": 4}
    fields |= {"per_device_train_batch_size": 2, "learning_rate": 0.01, "logging_steps": 1, "save_steps": 1}
    return fields | {"save_strategy": "steps", "disable_tqdm": True, "use_cpu": True}


@pytest.mark.parametrize("fusion", [FUSIONS[0], pytest.param(FUSIONS[1], marks=pytest.mark.slow)])
def test_train_resume_finetune_and_check(run, tmp_path, fusion, monkeypatch, capsys):
    def arguments(name: str, **changes) -> OlaVlmArguments:
        return OlaVlmArguments(**(run | {"fusion": fusion, "output_dir": str(tmp_path / name)} | changes))

    whole = train(arguments("whole"))
    with pytest.raises(KeyboardInterrupt):
        train(arguments("killed"), callbacks=[Interrupt(3)])
    resumed = train(arguments("killed", resume_from_checkpoint="true"))
    assert losses(resumed) == losses(whole)
    for name, value in weights(whole.model).items():
        assert value.equal(weights(resumed.model)[name]), name
    nothing = dict.fromkeys(("vision_tower", "language_model", "teachers", "fusion"))
    second = {"stage": "finetune", "checkpoint": str(tmp_path / "whole"), "save_strategy": "no", **nothing}
    tuned = train(arguments("tuned", **second)).model
    assert isinstance(tuned, MultiEncoderLlavaForConditionalGeneration) and tuned.config.fusion == fusion
    before, after = weights(whole.model), weights(tuned)
    encoders = [name for name in after if ".encoders." in name]
    assert encoders and all(after[name].equal(before[name]) for name in encoders)
    # the count of tokens before a run, from parts and from a checkpoint, is the run's
    counts = []
    for fields in (run | {"fusion": fusion}, run | second | nothing):
        monkeypatch.setitem(RECIPES, "tiny", lambda fields=fields: fields | {"output_dir": str(tmp_path)})
        cli.main(["check-data", "--recipe", "tiny", "--out", str(tmp_path / "facts.json")])
        counts.append(json.loads((tmp_path / "facts.json").read_text())["tokens"])
    lengths = {len(ids) for ids in whole.data_collator([whole.train_dataset[0]])["input_ids"]}
    assert counts == [6 * lengths.pop()] * 2


def test_wrong_input_is_explained(make, encoders, teachers, run, tmp_path):
    made = make("feature")
    with pytest.raises(ValueError, match=r"shape \(1, 3, 32, 32\), .*\[32, 64, 32, 64\] .*\(N, 30720\): take the"):
        made.model(**encode(made.llava_processor, random_rows(1)))
    with pytest.raises(ValueError, match="fusion is 'sum': choose one of"):
        build_multi_encoder(made.llava, made.llava_processor, encoders, "sum")
    with pytest.raises(ValueError, match="at least one encoder"):
        build_multi_encoder(made.llava, made.llava_processor, {}, "token")
    with pytest.raises(ValueError, match="vision can't be a part"):
        other = load_encoders({"seen": teachers["gen"] | {"encoder": "vision"}}, GRID)
        build_multi_encoder(made.llava, made.llava_processor, other, "token")
    with pytest.raises(ValueError, match=r"teachers\['gen'\] is .*: give its path"):
        load_encoders({"gen": {"encoder": "clip_image"}}, GRID)
    with pytest.raises(ValueError, match="give either fusion or tasks"):
        OlaVlmArguments(output_dir=str(tmp_path), fusion="token", tasks=[{"name": "gen"}])
    with pytest.raises(ValueError, match="give either checkpoint or"):
        parts = dict.fromkeys(("vision_tower", "language_model"))
        fields = run | parts | {"checkpoint": "somewhere", "fusion": "token", "output_dir": str(tmp_path)}
        train(OlaVlmArguments(**fields))
    fields = made.model.config.to_dict()
    for field, value, message in (
        ("num_encoder_tokens", 0, "num_encoder_tokens is 0"),
        ("image_seq_length", 15, "image_seq_length is 15"),
        ("encoders", [{"name": "gen"}], r"encoders\[\] is \['name'\]"),
        ("encoders", [fields["encoders"][0] | {"features": "first"}], r"encoders\[gen\].features is 'first'"),
    ):
        with pytest.raises(ValueError, match=message):
            MultiEncoderLlavaConfig(**fields | {field: value})
    made.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type is 'multi_encoder_llava'"):
        OlaVlmForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.slow
def test_in_the_miniature_when_asked_for(tmp_path):
    results = study.main(["--shrunk", "--out", str(tmp_path), "--methods", "llava", *METHODS])
    assert list(results["methods"]) == ["llava", *METHODS]
    assert list(results["comparisons"]) == [f"{name} - llava" for name in METHODS]
    report = (tmp_path / "report.md").read_text()
    for name in METHODS:
        assert f"| {name} |" in report and f"**{name} - llava**, probes" in report
        assert (tmp_path / name / "modeling_multi_encoder.py").exists()
