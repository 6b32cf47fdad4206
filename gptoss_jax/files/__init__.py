"""Paths, outputs that are complete or absent, and Parquet files."""
