"""Sources of a stage's batches: memory of the device, or a file that is read while training."""
