"""Rates as people read them."""


def rate(a_second: float, group: str = "") -> str:
    """A rate: whole, or with decimals where it is small; `group` parts thousands."""
    decimals = 0 if a_second >= 10 else 1 if a_second >= 0.1 or not a_second else 3
    return f"{a_second:{group}.{decimals}f}"
