"""The small GPT-OSS that ships with the project: its data, its training, and what it can do."""
