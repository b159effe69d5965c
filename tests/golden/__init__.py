"""Golden answers: what Hugging Face and PEFT alone say, kept as files, and the test that the engine says the same."""
