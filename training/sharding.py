"""FSDP2 for any model by one configuration, recipes/accelerate/fsdp2.yaml."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

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
            modules += module.children()
    return sorted(names)


def repeats_blocks(module: nn.Module) -> bool:
    """Whether it is a list of modules with parts of their own, at least two of them of one class."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    are_blocks = all(any(block.children()) and not isinstance(block, nn.ModuleList) for block in module)
    return are_blocks and len({type(block) for block in module}) < len(module)


def configure_fsdp2(plugin: FullyShardedDataParallelPlugin, model: nn.Module) -> None:
    """Completes a run's settings by what depends on the model, and mends accelerate's numeric types.

    Blocks of a user's own choice (`fsdp_transformer_layer_cls_to_wrap`) stay.
    """
    if plugin.fsdp_version != 2:
        return
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
        model.__class__ = sharded.__bases__[1]
    try:
        yield
    finally:
        model.__class__ = sharded
