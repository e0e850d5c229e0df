"""Checkpoints in use: loading any of them, and talking to them."""
