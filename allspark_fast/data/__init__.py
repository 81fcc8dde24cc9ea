"""Data: datasets, joint transforms, the loader of labeled and unlabeled crops, scenes, splits, checks."""
