"""Change a transformers model so that it runs on a backend with adapters."""
