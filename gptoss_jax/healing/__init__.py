"""Repair after pruning: what is left of a model learns to expect what the whole model expects."""
