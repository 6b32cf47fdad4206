"""Text from a model: prompts go through it whole, then all rows a token at a time; rows that end make room."""
