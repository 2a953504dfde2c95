"""Subspaces of a weight: how they are found, how large they are, how they are stored."""
