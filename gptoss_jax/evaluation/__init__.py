"""What a cut costs: keep-sets and models against a baseline, on the same tokens and the same questions."""
