"""TPU slices that are not at hand."""
