"""A run's folder: its log, checkpoints, trackers and data."""
