"""DESIGN's laws over the real engine: scheduler, adapters, kernels and sampler together."""
