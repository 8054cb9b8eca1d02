"""The stages of a run: each is a network, its batches, the objective that is minimised, and its scores."""
