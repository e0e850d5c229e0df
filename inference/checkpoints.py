"""Any checkpoint as (model, processor): the one way in which all commands load one.

A checkpoint is a folder or a name on the Hub: an OLA-VLM, a plain LLaVA, a multi-encoder baseline, any
image-text-to-text model of transformers, such a model with attached predictors (`training.attach`), or an adapter of
peft on one of these. What can't be loaded whole is refused in one line (`targets.loading`).
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils.hub import extract_commit_hash

from ..baselines.configuration_multi_encoder import MultiEncoderLlavaConfig
from ..baselines.modeling_multi_encoder import MultiEncoderLlavaForConditionalGeneration
from ..baselines.processing_multi_encoder import MultiEncoderLlavaProcessor
from ..configuration_ola_vlm import OlaVlmConfig
from ..modeling_ola_vlm import OlaVlmForConditionalGeneration
from ..processing_ola_vlm import OlaVlmProcessor
from ..targets.loading import (
    check_code,
    check_place,
    find_file,
    load_whole,
    loading_from,
    one_line,
    read_bin,
    read_json_object,
)
from ..training.attach import (
    PREDICTORS_FILE,
    AttachedPredictors,
    PredictorFields,
    attach_predictors,
    load_predictors,
)
from ..training.chat_template import check_chat_template

ADAPTER = "adapter_config.json"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
OWN_CLASSES = {
    OlaVlmConfig.model_type: (OlaVlmForConditionalGeneration, OlaVlmProcessor),
    MultiEncoderLlavaConfig.model_type: (MultiEncoderLlavaForConditionalGeneration, MultiEncoderLlavaProcessor),
}
# What peft raises for fields of other types, weights of other shapes and adapters of models that it doesn't know.
PEFT_ERRORS = (RuntimeError, KeyError, TypeError, AttributeError, ImportError, re.error)
# Model types of the authors' own code, whose checkpoints have other names and files.
REFERENCE_TYPES = ("ola_llama", "llava_llama", "ola_phi3", "llava_phi3")


def processes() -> PartialState:
    """torchrun's processes, or this one alone."""
    # Without `cpu` it sees no other process on CPUs.
    return PartialState(cpu=not torch.accelerator.is_available())


def check_is_no_file(checkpoint: str | Path) -> None:
    """ValueError for a file, as of arguments the wrong way round."""
    if Path(checkpoint).is_file():
        raise ValueError(
            f"{checkpoint} is a file, no checkpoint: CHECKPOINT comes first, a folder or a name on the Hub"
        )


def adapter_base(checkpoint: str | Path) -> str | None:
    """The name or folder of the model that an adapter was trained on; None if `checkpoint` is no adapter.
    ValueError for an adapter that doesn't say, and for a base that isn't there or is an adapter, too."""
    check_is_no_file(checkpoint)
    check_place(checkpoint)
    file = find_file(checkpoint, ADAPTER)
    if file is None:
        return None
    base = read_json_object(file).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ValueError(f"{checkpoint} is an adapter that names no base model: add it to its {ADAPTER}")
    try:
        check_place(base)
    except ValueError as error:
        raise ValueError(f"{checkpoint} is an adapter whose base model is missing: {error}") from error
    if find_file(base, ADAPTER) is not None:
        raise ValueError(f"{checkpoint} is an adapter on another one, {base}: merge that first (`ola-vlm merge`)")
    return base


def read_fields(checkpoint: str | Path) -> dict:
    """What config.json says. ValueError if there is none."""
    with loading_from(checkpoint):
        file = find_file(checkpoint, "config.json")
        if file is None:
            raise ValueError(f"{checkpoint} has no config.json and no {ADAPTER}: it is no checkpoint")
        return read_json_object(file)


def classes_of(
    checkpoint: str | Path, fields: dict, trust_remote_code: bool = False, llava_as_ours: bool = False
) -> tuple[type, type]:
    """Model's and processor's class for a configuration's `fields`. `llava_as_ours`: a plain LLaVA as an OLA-VLM
    without tasks, which can be trained, unless predictors were attached to it. ValueError for models that don't read
    images or that nobody knows."""
    # Ours, and what can be taken for ours.
    kind = fields.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise ValueError(f"{checkpoint} has the model_type {kind!r} in its config.json: it must be a name")
    if kind in OWN_CLASSES:
        return OWN_CLASSES[kind]
    # None: of a processor that was saved alone, which says nothing of a model.
    if llava_as_ours and kind in (None, "llava") and not fields.get("tasks"):
        return OWN_CLASSES[OlaVlmConfig.model_type]

    # Anybody's, by transformers' own class or, if the user allows it, by code in the checkpoint.
    if kind in REFERENCE_TYPES or str(kind).startswith("probe_"):
        what = f"{checkpoint} is a checkpoint of the reference implementation ({kind})"
        raise ValueError(f"{what}: convert it first (`ola-vlm convert`)")
    if kind in CONFIG_MAPPING:
        assert kind is not None
        # A language model alone, or an encoder, would fail later and by a longer message.
        if CONFIG_MAPPING[kind] not in AutoModelForImageTextToText._model_mapping:
            raise ValueError(f"{checkpoint} is a {kind}, which does not read images: give an image-text-to-text model")
    else:
        check_code(checkpoint, fields, trust_remote_code)
    return AutoModelForImageTextToText, AutoProcessor


def read_processor(
    checkpoint: str | Path, trust_remote_code: bool = False, llava_as_ours: bool = False
) -> ProcessorMixin | None:
    """A checkpoint's processor, of an adapter without one its base model's; None if there is none."""
    base = adapter_base(checkpoint)
    has_own = any(find_file(checkpoint, name) for name in PROCESSOR_FILES)
    if base is None and not has_own:
        return None
    if base is not None and not has_own:
        return read_processor(base, trust_remote_code, llava_as_ours)
    # A processor that was saved without a model says nothing of the model's type.
    model = base or checkpoint
    has_processor_only = llava_as_ours and find_file(model, "config.json") is None
    fields = {}
    if not has_processor_only:
        fields = read_fields(model)
    _, processor_class = classes_of(checkpoint, fields, trust_remote_code, llava_as_ours)
    # Our own classes never run a checkpoint's code.
    code = {}
    if processor_class is AutoProcessor:
        code["trust_remote_code"] = trust_remote_code
    # A template that can't ask a question is refused here, not in the middle of a benchmark.
    with loading_from(checkpoint, weights=False):
        processor = processor_class.from_pretrained(checkpoint, **code)
        check_chat_template(processor)
        return processor


def read_checkpoint(
    checkpoint: str | Path,
    trust_remote_code: bool = False,
    llava_as_ours: bool = False,
    needs_processor: bool = False,
    **loading,
) -> tuple[PreTrainedModel, ProcessorMixin | None]:
    """
    Model and processor as they are in the checkpoint, on the CPU unless `loading` says otherwise.

    `loading`: of `from_pretrained`: dtype ("auto" is the checkpoint's own), device_map, quantization_config.
    `trust_remote_code`: run code that comes with the checkpoint; for our own model types it is never needed or run.
    An adapter is merged into its base model: what comes back is a model of the base's class. The processor is None if
    the checkpoint has none.
    Raises ValueError, one line, for whatever can't be loaded whole; with `needs_processor` also for no processor.
    """
    checkpoint = str(checkpoint)
    base = adapter_base(checkpoint)
    fields = read_fields(base or checkpoint)
    model_class, _ = classes_of(base or checkpoint, fields, trust_remote_code, llava_as_ours)
    # It is fast, so what is wrong with it is said before the weights are read.
    processor = read_processor(checkpoint, trust_remote_code, llava_as_ours)
    if processor is None and needs_processor:
        raise ValueError(f"{checkpoint} has no processor ({PROCESSOR_FILES[0]}): save it there by save_pretrained")
    if base is not None:
        model = read_adapter(checkpoint, base, trust_remote_code, llava_as_ours, **loading)
        return model, processor
    # Our own models' predictors are among their weights.
    if model_class is not AutoModelForImageTextToText:
        return load_whole(model_class, checkpoint, **loading), processor
    # Attached ones lie in a file beside them.
    predictors = find_predictors(checkpoint, fields)
    model = load_whole(model_class, checkpoint, trust_remote_code=trust_remote_code, **loading)
    if predictors is not None:
        with fitting(predictors):
            attach_predictors(model, fields["tasks"], processor, predictors.parent)
    return model, processor


def find_predictors(checkpoint: str, fields: dict) -> Path | None:
    """The file of a checkpoint's attached predictors; None if it has no tasks of ours. ValueError if it has some, and
    no such file: all that was trained for them would be lost without a word."""
    if not fields.get("tasks"):
        return None
    file = find_file(checkpoint, PREDICTORS_FILE)
    # `task_token_ids` tells tasks of ours from a stranger's field of that name.
    if file is None and "task_token_ids" in fields:
        lacks = f"{checkpoint} has tasks in config.json and no {PREDICTORS_FILE}"
        raise ValueError(f"{lacks}: fetch that file too, or take `tasks` out of config.json")
    return file


@contextmanager
def fitting(predictors: Path) -> Iterator[None]:
    """ValueError, one line, for a file of predictors that are others than the tasks say."""
    try:
        yield
    except RuntimeError as error:
        # torch lists the names, on many lines.
        raise ValueError(f"{predictors} doesn't fit to the tasks of config.json: {one_line(error)}") from error


def adapter_weights(adapter: str) -> set[str]:
    """The names of the weights that an adapter's file holds, also of older versions of peft (.bin). ValueError if it
    has none."""
    weights = find_file(adapter, "adapter_model.safetensors")
    if weights is not None:
        with loading_from(adapter), safe_open(weights, "pt") as file:
            return set(file.keys())
    weights = find_file(adapter, "adapter_model.bin")
    if weights is None:
        raise ValueError(f"{adapter} has no adapter_model.safetensors: give a whole adapter")
    return set(read_bin(weights))


def read_adapter(adapter: str, base: str, trust_remote_code: bool, llava_as_ours: bool, **loading) -> PreTrainedModel:
    """The model `base` with an adapter merged into it, and with the predictors that were trained beside it."""
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ValueError(f"{adapter} is an adapter, which needs peft: pip install peft") from error
    written = adapter_weights(adapter)
    # The base with the adapter's layers in it.
    model, _ = read_checkpoint(base, trust_remote_code, llava_as_ours, **loading)
    with loading_from(adapter):
        try:
            wrapped = PeftModel.from_pretrained(model, adapter)
        except PEFT_ERRORS as error:
            # torch lists the shapes, peft a name.
            what = f"{adapter} lacks weights or doesn't fit to its base model {base}"
            raise ValueError(f"{what}: {one_line(error)}") from error

    # peft leaves layers that the file lacks as they begin, where they change nothing.
    needed = get_peft_model_state_dict(wrapped, save_embedding_layers=False).keys()
    missing = sorted(needed - written)
    if missing:
        raise ValueError(f"{adapter} has no weights for {', '.join(missing[:5])}: give a whole adapter")
    # Of a larger vocabulary peft writes the embeddings, too.
    tables = ("embed_tokens", "lm_head")
    unused = sorted(name for name in written - needed if not any(table in name for table in tables))
    if unused:
        what = f"{adapter} has weights that its {ADAPTER} doesn't name, {', '.join(unused[:5])}"
        remedy = f"name them there (target_modules, modules_to_save), or take the {ADAPTER} that was saved with them"
        raise ValueError(f"{what}: {remedy}")

    # One model again, of the base's class, and the predictors that trained beside the adapter.
    merged = wrapped.merge_and_unload()
    predictors = find_file(adapter, PREDICTORS_FILE)
    if predictors is None:
        return merged
    with fitting(predictors):
        if isinstance(merged, (AttachedPredictors, OlaVlmForConditionalGeneration)):
            load_predictors(merged, predictors.parent)
        else:
            fields = PredictorFields.read(predictors)
            attach_predictors(merged, fields.tasks, checkpoint=predictors.parent)
            merged.config.image_view = fields.image_view
    return merged


def load_checkpoint(
    checkpoint: str | Path, dtype: str = "auto", device_map: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    `read_checkpoint` for answers: the model goes to this process's own device unless there is a `device_map`; `dtype`
    "auto" is the checkpoint's own on a GPU, float32 on a CPU. ValueError also for a checkpoint without a processor.
    """
    device = processes().device
    assert device is not None
    # CPUs compute in 16 bits slowly, where they can at all.
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    options = {"needs_processor": True, "dtype": dtype, "device_map": device_map}
    model, processor = read_checkpoint(checkpoint, trust_remote_code, **options)
    # `needs_processor` asks for it.
    assert processor is not None
    # accelerate has placed a model with a device map; a 4-bit one can't be moved at all.
    if device_map is None:
        model = model.to(device)  # pyright: ignore[reportArgumentType] (its stub)
    return model, processor


def weights_state(checkpoint: str | Path) -> str:
    """What changes when a checkpoint does: a hash of its files' names, sizes and dates, or its commit on the Hub; of
    an adapter also its base model's."""
    base = adapter_base(checkpoint)
    of_base = ""
    config_name = "config.json"
    if base is not None:
        of_base = f" on {weights_state(base)}"
        config_name = ADAPTER
    # A name on the Hub, or a folder of this machine.
    if not Path(checkpoint).is_dir():
        # The commit is part of the path in the Hub's cache.
        with loading_from(checkpoint):
            file = find_file(checkpoint, config_name)
        return f"{extract_commit_hash(str(file), None)}{of_base}"
    # Not of their contents: gigabytes would be read for each comparison.
    # Weights, settings, tokenizers, chat templates and code: all that answers and probes depend on.
    suffixes = (".safetensors", ".bin", ".json", ".jinja", ".model", ".py")
    # Other texts are notes and logs, which may be written to all along.
    vocabularies = ("vocab.txt", "merges.txt")
    files = sorted(file for file in Path(checkpoint).iterdir() if file.suffix in suffixes or file.name in vocabularies)
    state = repr([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    return f"files:{hashlib.sha256(state.encode()).hexdigest()[:16]}{of_base}"
