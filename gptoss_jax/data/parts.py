"""The two parts of any rows, by hash: those that experts are chosen by, and those that judge the choice."""

PARTS = ("all", "calibration", "evaluation")
FIFTHS = 5  # of which one is for evaluation


def part_of(digest: bytes) -> str:
    """The part of a row, from the first 8 bytes of SHA-256 of "part\\nid\\ntext"."""
    return "evaluation" if int.from_bytes(digest, "big") % FIFTHS == 0 else "calibration"
