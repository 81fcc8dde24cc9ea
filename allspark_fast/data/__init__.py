"""Data: data sets, joint transforms, the labeled + unlabeled loader, procedural scenes, splits, checks."""
