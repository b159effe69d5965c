"""Helpers that several methods share: configs, targets, expected tensors, updates of full modules."""
