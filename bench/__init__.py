"""Benchmarks of the operators and of the training step against straightforward implementations."""
