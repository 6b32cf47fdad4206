"""Fingerprints: which experts the answers of a kind use. What is published is read; experts are ranked by domain."""
