"""The base model and the kernels of its primitives."""
