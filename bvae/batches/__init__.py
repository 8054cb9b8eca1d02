"""Where a stage's batches come from: memory of the device, or a file that is read while training."""
