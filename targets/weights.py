"""Weights into models: each is read once, and none is held twice."""

from contextlib import suppress
from pathlib import Path
from typing import TypeVar, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

ADAPTER_CONFIG = "adapter_config.json"
# What safetensors files call the numeric types that a model may be loaded in.
SAFETENSORS_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}


def tensors_on_demand(path: str | Path) -> dict:
    """Name -> tensor of a checkpoint's safetensors files, read only when it is indexed with `[...]`; none if there are
    no such files."""
    optional = {"_raise_exceptions_for_missing_entries": False}
    whole = cached_file(str(path), SAFE_WEIGHTS_NAME, **optional)
    files = [whole]
    if not whole:
        index = cached_file(str(path), SAFE_WEIGHTS_INDEX_NAME, **optional)
        if index is None:
            return {}
        files, _ = get_checkpoint_shard_files(str(path), index)
    tensors = {}
    for file in files or ():
        # Not mapped into memory: pages that were read would stay there as long as the file is open.
        opened = safe_open(file, framework="pt", device="cpu", backend="pread")
        for name in opened.keys():  # noqa: SIM118 (it is no dict)
            tensors[name] = opened.get_slice(name)
    return tensors


def not_mapped(weight: Tensor, path: str | Path, names: list[str]) -> Tensor:
    """
    A loaded tensor that is to be replaced, read once more into memory of its own, which is given back; where it is
    mapped from its file, its pages would stay. The same `weight` if no file of `path` has it by one of `names`.
    """
    if weight.is_meta:
        return weight
    tensors = tensors_on_demand(path)
    for name in names:
        stored = tensors.get(name)
        if stored is not None and stored.get_dtype() == SAFETENSORS_NAMES.get(weight.dtype):
            return stored[:].to(weight.device)
    return weight


def _is_adapter(path) -> bool:
    return cached_file(str(path), ADAPTER_CONFIG, _raise_exceptions_for_missing_entries=False) is not None


def load_pretrained(model_class, path, dtype: torch.dtype | str | None = None, **kwargs) -> tuple:
    """
    `from_pretrained`'s model and its report of what was loaded.

    transformers maps safetensors files into memory. If they have the wanted `dtype` that costs nothing, and all
    processes of a machine share them. If not, the whole files would be in memory beside the converted weights: then
    each tensor is read when it is converted.
    """
    # None is the files' own, as "auto" is.
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    # A revision, a device map, a quantization: whoever gives more gets transformers' own way.
    plain = wanted in SAFETENSORS_NAMES and not any(kwargs.values()) and not is_deepspeed_zero3_enabled()
    if wanted is not None and plain and not _is_adapter(path):
        tensors = tensors_on_demand(path)
        others = set(SAFETENSORS_NAMES.values()) - {SAFETENSORS_NAMES[wanted]}
        is_concrete = issubclass(model_class, PreTrainedModel)
        config_class = cast(type[PreTrainedConfig], model_class.config_class) if is_concrete else AutoConfig
        config = config_class.from_pretrained(path)
        # Quantized weights, and those whose configuration names their file, are for transformers to read.
        is_special = any(hasattr(config, field) for field in ("quantization_config", "transformers_weights"))
        if not is_special and any(tensor.get_dtype() in others for tensor in tensors.values()):
            return _load_converted(model_class, path, config, tensors, wanted)
    return model_class.from_pretrained(path, dtype=dtype, output_loading_info=True, **kwargs)


def _load_converted(model_class, path, config: PreTrainedConfig, tensors: dict, dtype: torch.dtype) -> tuple:
    if not issubclass(model_class, PreTrainedModel):
        # Only a model's own class takes tensors in place of a folder.
        with torch.device("meta"):
            model_class = type(model_class.from_config(config))
    options = {"config": config, "state_dict": tensors, "dtype": dtype, "output_loading_info": True}
    model, report = model_class.from_pretrained(None, **options)  # pyright: ignore[reportGeneralTypeIssues] (with the report it is two)
    model.name_or_path = str(path)
    model.config.name_or_path = str(path)
    if model.can_generate():
        # Not every checkpoint has one.
        with suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(path)
    return model, report


# Models of fewer weights draw a value for each of them before those of the new parts, as all did once: the numbers of
# the runs in docs/ come out again. Nobody waits for them.
DRAWN_WHOLE = 200_000_000


Model = TypeVar("Model", bound=PreTrainedModel)


def assemble(
    model_class: type[Model],
    config: PreTrainedConfig,
    weights: dict[str, Tensor],
    new: tuple[str, ...],
    dtype: torch.dtype,
) -> Model:
    """
    A model of `config` around the tensors of `weights` (by its state dict's names): not copied unless they have
    another type than `dtype`. Only what is `new` (beginnings of names) is drawn, from torch's generator.
    ValueError for a tensor that the model has no place for, and for one that is neither given nor new.
    """
    weights = dict(weights)
    if sum(weight.numel() for weight in weights.values()) < DRAWN_WHOLE:
        for name, value in model_class(config).state_dict().items():
            if name.startswith(new):
                weights.setdefault(name, value)
    verbosity = logging.get_verbosity()
    # transformers would list all that is new.
    logging.set_verbosity_error()
    options = {"config": config, "state_dict": weights, "dtype": dtype, "output_loading_info": True}
    try:
        model, report = model_class.from_pretrained(None, **options)  # pyright: ignore[reportGeneralTypeIssues] (with the report it is two)
    finally:
        logging.set_verbosity(verbosity)
    lost = [f"no place for {name}" for name in sorted(report["unexpected_keys"])]
    lost += [f"no weights for {name}" for name in sorted(report["missing_keys"]) if not name.startswith(new)]
    if lost:
        raise ValueError(f"{model_class.__name__} can't be built of these parts: {', '.join(lost[:5])}")
    # transformers would save under the names of `weights`; without this it takes those of the model's type.
    model._weight_conversions = None
    for parameter in model.parameters():
        # Else transformers' functions would never draw it again.
        parameter._is_hf_initialized = False
    model.name_or_path = ""
    model.config.name_or_path = ""
    return model
