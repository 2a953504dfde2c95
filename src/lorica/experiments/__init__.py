"""Streams of tasks: every method on the same tasks, seeds and orders, resumable and recorded."""
