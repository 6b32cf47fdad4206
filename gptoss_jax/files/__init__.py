"""Paths, and outputs that are complete or absent."""
