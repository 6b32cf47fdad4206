"""What a cut costs: keep-sets and models beside a baseline, on the same tokens and the same questions."""
