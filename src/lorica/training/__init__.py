"""Training: transformers' Trainer with a method, its arguments with our defaults, and a clean end on signals."""
