"""The small GPT-OSS that ships with the project: its data, its training, and what it can do."""

from pathlib import Path

QUESTIONS = Path(__file__).parent / "questions"
"""calibration.jsonl and evaluation.jsonl: some instances of each family, for which no reasoning-gym is needed."""
