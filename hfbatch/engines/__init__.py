"""One file per engine: loads a model, runs batches on a device."""
