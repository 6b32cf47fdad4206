"""Does choosing together, and healing, answer better than scores of single experts? On nano, family by family."""
