"""Devices: what is split over them, where a step runs, and many processes as one run."""
