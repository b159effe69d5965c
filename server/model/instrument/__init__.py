"""How a transformers model is changed to run on a backend with adapters."""
