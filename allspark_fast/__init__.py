"""AllSpark (CVPR 2024) for semi-supervised semantic segmentation, exact and fast."""
