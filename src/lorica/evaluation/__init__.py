"""Evaluation: the loss on given answers, and greedy generation compared with them."""
