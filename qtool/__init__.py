"""Quantize trained PyTorch networks: numerics, observers, graph passes, and a command line."""
