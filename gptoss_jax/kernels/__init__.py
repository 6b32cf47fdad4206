"""Compiled implementations of products."""
