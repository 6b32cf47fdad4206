"""Checkpoints of GPT-OSS: reading, dequantising, pruning and writing the Hugging Face form."""
