"""Paged attention: the KV cache, the layout of a batch and the call into a backend."""
