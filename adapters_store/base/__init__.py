"""Find, identify and describe a base model."""
