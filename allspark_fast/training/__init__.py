"""What changes between two steps: the trainer, the step, its setup, checkpoints, log and pictures."""
