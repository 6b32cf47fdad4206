"""The GPT-OSS network."""
