"""FSDP2 for any model by one configuration, recipes/accelerate/fsdp2.yaml; its checkpoints are an unsharded run's."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TypeGuard, cast

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import disable_fsdp_ram_efficient_loading
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ..modeling_ola_vlm import EmbeddingPredictor


def block_classes(model: nn.Module) -> list[str]:
    """The classes of the model's blocks, by name: predictors, and what a list of modules holds several of, as layers.
    Not blocks within blocks, nor single layers (linear ones, norms), whose weights may be used without a call, when
    sharded ones aren't gathered."""
    names = set()
    modules = [model]
    while modules:
        module = modules.pop()
        if isinstance(module, EmbeddingPredictor):
            names.add(type(module).__name__)
        elif repeats_blocks(module):
            names.update(type(block).__name__ for block in module)
        else:
            # Neither a block nor a list of some: they may lie further inside.
            modules += module.children()
    return sorted(names)


def repeats_blocks(module: nn.Module) -> TypeGuard[nn.ModuleList | nn.Sequential]:
    """Whether it is a list of modules with parts of their own, at least two of them of one class."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    are_blocks = all(any(block.children()) and not isinstance(block, nn.ModuleList) for block in module)
    # Fewer classes than modules: one of them repeats.
    return are_blocks and len({type(block) for block in module}) < len(module)


def configure_fsdp2(plugin: FullyShardedDataParallelPlugin, model: nn.Module) -> None:
    """Completes a run's settings by what depends on the model, and mends accelerate's numeric types.

    Blocks of a user's own choice (`fsdp_transformer_layer_cls_to_wrap`) stay. ValueError for settings whose
    checkpoints nothing but such a run can read.
    """
    if plugin.fsdp_version != 2 or plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        settings = f"fsdp_version {plugin.fsdp_version} with {StateDictType(plugin.state_dict_type).name}"
        raise ValueError(f"{settings} is not supported: take recipes/accelerate/fsdp2.yaml (2, FULL_STATE_DICT)")
    # The model is there; from now on each rank reads checkpoints by itself.
    disable_fsdp_ram_efficient_loading()
    if plugin.auto_wrap_policy is transformer_auto_wrap_policy and plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = block_classes(model)
    if isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
        # As without sharding: losses stay in fp32, and gradients are summed over ranks in fp32.
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy,
            reduce_dtype=torch.float32,
            output_dtype=None,
        )


@contextmanager
def original_class(model: nn.Module) -> Iterator[None]:
    """The model has the class again that `fully_shard` took from it: a checkpoint is named after the class, and gets
    the files that define it."""
    sharded = type(model)
    if isinstance(model, FSDPModule):
        # torch makes a class of (FSDPModule, the model's own).
        model.__class__ = sharded.__bases__[1]
    try:
        yield
    finally:
        model.__class__ = sharded  # pyright: ignore[reportAttributeAccessIssue] (as torch's fully_shard does it)


def retie(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Weights that the model ties are one tensor again: gathered, each name has one of its own, and a checkpoint would
    hold both."""
    # Tied weights are one parameter under several names.
    tensors = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in state_dict:
            state_dict[name] = tensors.setdefault(id(parameter), state_dict[name])


def shard_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of `whole`, if the parameter is sharded; no rank is waited for."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


@contextmanager
def takes_whole_weights(model: nn.Module) -> Iterator[None]:
    """`load_state_dict` of a sharded model takes the weights of an unsharded one, whoever calls it."""

    def shard_entries(module, state_dict, prefix, *unused):
        for name, parameter in module.named_parameters(recurse=False):
            if prefix + name in state_dict:
                state_dict[prefix + name] = shard_like(state_dict[prefix + name], parameter)

    handles = [module.register_load_state_dict_pre_hook(shard_entries) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gather_whole(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies of weights, on CPUs, of which ZeRO-3 may leave each rank a part. All ranks call it together."""
    gathered = nullcontext()
    # DeepSpeed's mark of those.
    if any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
        from deepspeed import zero  # pyright: ignore[reportMissingImports] (only its runs have it)

        gathered = zero.GatheredParameters([*parameters.values()])
    with gathered:
        return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}


def gather_optimizer(optimizer: Optimizer) -> dict:
    """The `state_dict` that it would have unsharded, on CPUs. All ranks call it together; the first one alone gets the
    tensors."""
    is_first = distributed.get_rank() == 0
    state = optimizer.state_dict()
    gathered = {}
    for place, values in state["state"].items():
        gathered[place] = {}
        for name, value in values.items():
            if isinstance(value, DTensor):
                # Offloaded to CPUs, a shard goes back to the device that ranks exchange tensors on.
                value = cast(DTensor, value.to(value.device_mesh.device_type)).full_tensor()
            # The others' copies are let go one by one: all of them would be an unsharded optimizer on each rank.
            if is_first:
                if isinstance(value, Tensor):
                    value = value.cpu()
                gathered[place][name] = value
    return {**state, "state": gathered}


def load_optimizer(optimizer: Optimizer, file: Path) -> None:
    """From the file of an unsharded run, of which each rank reads its part."""
    state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    # An optimizer's file knows parameters by their place in its groups, one after the other.
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    for place, values in state["state"].items():
        parameter = parameters[place]
        for name, value in values.items():
            # Moments have the parameter's shape; the number of steps has none, and every rank needs it.
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = shard_like(value, parameter)
    optimizer.load_state_dict(state)
