"""Conversion: parts -> OLA-VLM, the reference's checkpoints -> OLA-VLM, OLA-VLM -> plain LLaVA."""
