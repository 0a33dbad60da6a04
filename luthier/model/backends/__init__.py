"""Libraries that load and compute a model in their own way: Unsloth and KTransformers."""
