"""Which experts each token chose: traces of them, and the segments of a conversation that tokens are of."""
