"""OLA-VLM: multimodal LLMs whose hidden layers are taught to see. The names below are loaded when they are used."""

import importlib
from typing import TYPE_CHECKING

# What type checkers and editors read; at run time `__getattr__` does the same.
if TYPE_CHECKING:
    from .configuration_ola_vlm import OlaVlmConfig
    from .convert.parts import build_ola_vlm
    from .inference.checkpoints import load_checkpoint
    from .modeling_ola_vlm import OlaVlmForConditionalGeneration
    from .probing.probes import load_probes
    from .processing_ola_vlm import OlaVlmProcessor
    from .training.attach import attach_predictors
    from .training.collator import OlaVlmCollator
    from .training.losses import embedding_loss
    from .training.trainer import OlaVlmTrainer

__version__ = "0.1.0"

# Public name -> the module that has it.
_MODULES = {
    "OlaVlmConfig": ".configuration_ola_vlm",
    "OlaVlmForConditionalGeneration": ".modeling_ola_vlm",
    "OlaVlmProcessor": ".processing_ola_vlm",
    "build_ola_vlm": ".convert.parts",
    "attach_predictors": ".training.attach",
    "OlaVlmTrainer": ".training.trainer",
    "OlaVlmCollator": ".training.collator",
    "embedding_loss": ".training.losses",
    "load_checkpoint": ".inference.checkpoints",
    "load_probes": ".probing.probes",
}

__all__ = [
    "OlaVlmCollator",
    "OlaVlmConfig",
    "OlaVlmForConditionalGeneration",
    "OlaVlmProcessor",
    "OlaVlmTrainer",
    "__version__",
    "attach_predictors",
    "build_ola_vlm",
    "embedding_loss",
    "load_checkpoint",
    "load_probes",
]


# Called for names that the module doesn't have yet, so `import ola_vlm` costs no import of torch.
def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'ola_vlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
