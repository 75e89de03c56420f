"""Inference engines: each loads a model and runs batches on a device."""
