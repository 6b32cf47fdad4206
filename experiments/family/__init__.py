"""nano cut for each of its families by the fingerprints of its own answers, and measured."""
