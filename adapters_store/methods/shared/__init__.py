"""Parts that several methods share: configs, targets, expected tensors."""
