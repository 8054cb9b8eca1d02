"""The training loop, its steps, and the ways to run them: one by one, as a CUDA graph, compiled."""
