"""A pruned model drafts, and the whole one accepts or rejects: what comes out is what the whole one says alone."""
