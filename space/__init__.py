"""The Gradio Space: `app` starts it, `layout` is the page, `handlers` what its events do.

`uploads` and `conversations` check what visitors send, within `limits`; `galleries` makes the layers' pictures and
their legends, `examples` the questions on the cards, `links` the addresses.
"""

import os

# Before torch, on ZeroGPU, and so before every other module of the room.
from . import zero_gpu as zero_gpu

# Gradio reads it when it is imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
