"""Whether a model chooses the experts that were recorded: answers are forced through it, and choices compared."""
