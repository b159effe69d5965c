"""Answer one generation: identify the caller, resolve adapters, encode, run, decode and account."""
