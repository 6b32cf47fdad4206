"""From statistics to rankings and keep-sets."""
