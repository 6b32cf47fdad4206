"""How far two records of the same tokens' choices agree, and the report of it. Letters: see `config`."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from .forcing import Choices

# A recording may round at other places than our bfloat16 does, so that both err from the exact values on their own:
# twice the disagreement of one of them is the most to expect. A thousandth more is left for few tokens.
ROUNDINGS, LEEWAY = 2.0, 0.001


@dataclass(frozen=True)
class Agreement:
    """Shares of tokens."""

    rank_Lk: Float[np.ndarray, "L k"]
    """The same expert at the same rank."""
    set_L: Float[np.ndarray, " L"]
    """The same k experts, in any order."""
    gates_L: Float[np.ndarray, " L"]
    """The mean difference of gates where the expert is the same; NaN where it never is."""

    @classmethod
    def of(cls, one: Choices, other: Choices) -> "Agreement":
        """Of two records of the same tokens."""
        same_TLk = one.experts_TLk == other.experts_TLk
        sets_TL = (np.sort(one.experts_TLk, -1) == np.sort(other.experts_TLk, -1)).all(-1)
        apart_TLk = np.abs(one.gates_TLk.astype(np.float64) - other.gates_TLk)
        counts_L = same_TLk.sum((0, 2))
        with np.errstate(invalid="ignore"):
            gates_L = np.where(same_TLk, apart_TLk, 0).sum((0, 2)) / counts_L
        return cls(same_TLk.mean(0), sets_TL.mean(0), gates_L)

    @property
    def rank(self) -> float:
        """The share of all pairs of a token and a rank."""
        return float(self.rank_Lk.mean())

    @property
    def set(self) -> float:
        """The share of all pairs of a token and a layer."""
        return float(self.set_L.mean())

    @property
    def gates(self) -> float:
        """The mean difference of gates over all pairs whose expert is the same."""
        weights_L = self.rank_Lk.mean(1)
        return float(np.nansum(weights_L * self.gates_L) / weights_L.sum()) if weights_L.any() else float("nan")


def least(expected: Agreement) -> tuple[float, np.ndarray]:
    """The least agreement at the same rank that rounding explains: of all, and of each layer, [L]."""
    below, below_L = 1 - expected.rank, 1 - expected.rank_Lk.mean(1)
    return 1 - ROUNDINGS * below - LEEWAY, 1 - ROUNDINGS * below_L - LEEWAY


def verdict(found: Agreement, expected: Agreement) -> str:
    """One line: whether what was recorded agrees with the model as far as rounding lets it."""
    overall, by_layer_L = least(expected)
    figures = f"{found.rank:.2%} of choices are as recorded, and rounding explains {overall:.2%} or more"
    if found.rank >= overall:
        return f"AGREES: {figures}."
    worse = np.flatnonzero(found.rank_Lk.mean(1) < by_layer_L)
    return f"DIFFERS: {figures}; the first layer that falls short is {worse[0]}."


def report(recorded: Choices, ours: dict[str, Choices]) -> str:
    """Markdown: agreement of all, by layer and rank, and the verdict."""
    found = {dtype: Agreement.of(recorded, choices) for dtype, choices in ours.items()}
    expected = Agreement.of(ours["bfloat16"], ours["float32"])
    rows = {f"recorded, and the model in {dtype}": one for dtype, one in found.items()}
    rows["expected: the model in bfloat16, and in float32"] = expected
    lines = ["| of all layers | same expert, same rank | same set | gates apart |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {one.rank:.2%} | {one.set:.2%} | {one.gates:.5f} |" for name, one in rows.items()]
    against = found["float32"]
    k = against.rank_Lk.shape[1]
    ranks = " | ".join(f"rank {rank + 1}" for rank in range(k))
    lines += ["", f"| layer | {ranks} | same set | gates apart | expected, same rank | expected, same set |"]
    lines += ["|---:" * (k + 5) + "|"]
    for layer, rank_k in enumerate(against.rank_Lk):
        cells = [f"{share:.2%}" for share in [*rank_k, against.set_L[layer]]]
        cells += [f"{against.gates_L[layer]:.5f}"]
        cells += [f"{expected.rank_Lk[layer].mean():.2%}", f"{expected.set_L[layer]:.2%}"]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    lines += [
        "",
        "By layer, what was recorded is compared with the model in float32. What to expect is how far the model in "
        "bfloat16 agrees with itself in float32 on the same tokens: no recording in bfloat16 need agree more.",
        "",
        verdict(against, expected),
    ]
    return "\n".join(lines)
