"""A run of the profile: options, steps, engines, artifacts."""
