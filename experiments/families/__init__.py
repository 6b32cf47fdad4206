"""nano by family: criteria, what counts, and mixes of domains, beside the full model and keep-sets drawn at random."""
