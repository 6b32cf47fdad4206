"""The statistics of experts: sums, their store, their tables."""
