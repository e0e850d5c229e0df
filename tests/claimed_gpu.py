"""A GPU that isn't there: tensors that claim cuda:0 and compute on the CPU, and refuse what a GPU would refuse.

`on_gpu(x)` makes one, `move(module)` gives a module such parameters and buffers, and within `ClaimedGpu()` everything
that is asked for on "cuda" is one. A function of torch that takes one of them and a CPU tensor raises `MixedDevices`:
what `torch.arange(n)` without a device leads to.
"""

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
# They copy from one device to another, or take indices from the CPU.
ACROSS = {Tensor.copy_, Tensor.__getitem__, Tensor.__setitem__, Tensor.type_as, Tensor.index_put_}


class MixedDevices(RuntimeError):
    """An operation has tensors of several devices."""


class OnGpu(Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function == Tensor.device.__get__:
            return CUDA
        if function == Tensor.is_cuda.__get__:
            return True
        if function is Tensor.numpy:
            raise MixedDevices("numpy() of a tensor on a GPU: .cpu() first")
        if function is Tensor.cpu:
            return args[0].as_subclass(Tensor)
        args, kwargs, device = without_device(function, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_cpu = [tensor for tensor in tensors if not isinstance(tensor, OnGpu) and tensor.dim() > 0]
        if on_cpu and device is None and function not in ACROSS:
            places = [(tuple(tensor.shape), tensor.device.type) for tensor in tensors]
            raise MixedDevices(f"{getattr(function, '__name__', function)} of tensors on several devices: {places}")
        result = super().__torch_function__(function, types, args, kwargs)
        return tree_map(on_cpu_again, result) if device is not None and device.type == "cpu" else result


class ClaimedGpu(TorchFunctionMode):
    """CPU tensors that are sent to a GPU, or made there."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if OnGpu in types:  # its own method, above
            return function(*args, **kwargs)
        if function is Tensor.cuda:
            return on_gpu(args[0])
        args, kwargs, device = without_device(function, args, kwargs)
        result = function(*args, **kwargs)
        return tree_map(on_gpu, result) if device is not None and device.type == "cuda" else result


def without_device(function, args, kwargs) -> tuple[tuple, dict, torch.device | None]:
    """The arguments with a GPU replaced by the CPU, and the device that was asked for."""
    args = list(args)
    device = kwargs.get("device")
    if "device" in kwargs and device is not None:
        kwargs["device"] = "cpu"
    elif function is Tensor.to and len(args) > 1:
        if isinstance(args[1], Tensor):
            device = args[1].device
            args[1] = args[1].dtype
        elif isinstance(args[1], (str, torch.device)):
            device = args[1]
            args[1] = "cpu"
    return tuple(args), kwargs, None if device is None else torch.device(device)


def on_gpu(value):
    return value.as_subclass(OnGpu) if isinstance(value, Tensor) else value


def on_cpu_again(value):
    return value.as_subclass(Tensor) if isinstance(value, OnGpu) else value


def move(module: nn.Module) -> nn.Module:
    """In place; tied parameters stay tied."""
    moved = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in moved:
                claimed = nn.Parameter(on_gpu(parameter.data), requires_grad=parameter.requires_grad)
                moved[id(parameter)] = claimed
            part._parameters[name] = moved[id(parameter)]
        for name, buffer in part._buffers.items():
            part._buffers[name] = on_gpu(buffer)
    return module
