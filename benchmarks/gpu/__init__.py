"""The GPU suite: see README.md in this folder."""
