"""The commands of `ola-vlm`: their arguments and their help, light to import; table.py says who does the work."""
