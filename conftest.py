"""Puts the repository root on the import path, so that tests run without an installation and can import bench."""
