"""The constraint: which layers it holds for, how it is held, and the proof that it was."""
