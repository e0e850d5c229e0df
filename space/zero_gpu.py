"""ZeroGPU, the Hub's hardware that lends a Space a GPU for the time of a call."""

from collections.abc import Callable

try:
    # Nowhere but on ZeroGPU is it installed. It must be imported before torch.
    import spaces  # pyright: ignore[reportMissingImports] (on the Hub only)
except ImportError:
    spaces = None


def on_gpu(function: Callable) -> Callable:
    """On ZeroGPU the function gets a GPU for its time; elsewhere it stays as it is."""
    return spaces.GPU(function) if spaces else function
