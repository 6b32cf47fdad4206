"""The statistics of experts: each declared once, how sums merge, what is derived. Letters: see `config`.

All sums run over kept (token, chosen expert) pairs, with g the gate, n = ‖f_j(x)‖₂ of the expert's
output before the gate, and w the token's weight (1 unless asked otherwise). Sums over tokens merge
by addition, in any grouping: over batches, hosts, domains and runs.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from ..devices import mesh as sharding
from ..devices.placement import Placement
from ..errors import StatisticsError
from ..network.batch import Batch
from ..network.experts import Mixture
from ..network.router import Routing, entropy

GATE_BINS = 200  # of [0, 1]; the published usage tables of gpt-oss-20b have bins of 0.005
SUMMED_AT_ONCE = 256  # tokens


@dataclass(frozen=True)
class Statistic:
    """What is declared of a statistic. Sharding, shapes, the store, tables and the check for NaN follow from it."""

    axes: str
    """Its dimensions behind L, by their letters."""
    integer: bool = False
    """Whether it counts: int32 on a device, int64 on the host. Others are float32 and float64."""
    largest: bool = False
    """Whether the larger one is kept where statistics merge; others are added, and 0 is the least of either."""
    mean: str = ""
    """The name of its mean over pairs, which is a column of tables too."""
    since: int = 1
    """The version of the store that first has it: older ones lack it. A new statistic takes `store.VERSION` + 1."""
    asked: str = ""
    """The option of `Counting` that asks for it, where not every run has it."""

    @property
    def reduce(self) -> np.ufunc:
        """How two of them become one."""
        return np.maximum if self.largest else np.add

    @property
    def by_expert(self) -> bool:
        """Whether it is a column of the saliency table, in the order of declaration."""
        return self.axes == "G E"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Statistics:
    """Statistics by group; one step's are on the device, totals on the host. A scan over layers stacks them to
    [L, G, …]. None stands for one that the store of an older version lacks, or that the run was not asked for."""

    count: Annotated[Any, Statistic("G E", integer=True)]
    """Pairs."""
    gate_sum: Annotated[Any, Statistic("G E", mean="gate_mean")]
    """Σ w·g."""
    norm_sum: Annotated[Any, Statistic("G E", mean="norm_mean")]
    """Σ w·n."""
    gate_norm_sum: Annotated[Any, Statistic("G E", mean="saliency_mean")]
    """Σ w·g·n."""
    gate_norm_sq_sum: Annotated[Any, Statistic("G E")]
    """Σ w·(g·n)²."""
    norm_sq_sum: Annotated[Any, Statistic("G E")]
    """Σ w·n²."""
    norm_max: Annotated[Any, Statistic("G E", largest=True)]
    """max n."""
    activation_max: Annotated[Any, Statistic("G E", largest=True)]
    """max |f_j(x)|."""
    coactivation: Annotated[Any, Statistic("J E E", integer=True)]
    """Tokens that chose both experts; the diagonal is 0."""
    tokens: Annotated[Any, Statistic("G", integer=True)]
    """Kept tokens."""
    gate_rank_sum: Annotated[Any, Statistic("G k")]
    """Σ of the gate of rank 1…k."""
    gate_histogram: Annotated[Any, Statistic("G b", integer=True)]
    """Pairs by gate, in b = GATE_BINS bins of [0, 1]."""
    router_entropy_sum: Annotated[Any, Statistic("G")]
    """Σ entropy of the softmax over all router logits, in nats."""
    computed: Annotated[Any, Statistic("G", integer=True)]
    """Pairs whose expert ran, kept or not: k for each token that is no padding, unless some were dropped."""
    swap_sum: Annotated[Any, Statistic("G E", since=3, asked="swap")] = None
    """Σ w·‖Δ‖²/‖h‖², Δ the change of the layer's output where the expert is dropped and the runner-up enters, h the
    residual stream behind the layer."""
    lead_count: Annotated[Any, Statistic("G E", integer=True, since=4)] = None
    """Pairs of a token's first expert: that with the highest gate."""

    @classmethod
    def of(cls, make: Callable[[str, Statistic], Any]) -> "Statistics":
        """Statistics whose every field `make` gives, from its name and its declaration."""
        return cls(**{name: make(name, statistic) for name, statistic in DECLARED.items()})

    @classmethod
    def specs(cls, asked: Collection[str] = ()) -> "Statistics":
        """How those of all layers are split over a mesh; `asked` names the options that ask for some."""
        return cls.of(lambda _, s: sharding.split(f"L {s.axes}") if not s.asked or s.asked in asked else None)

    def arrays(self) -> dict[str, Any]:
        """Those that are there, by their names."""
        return {name: x for name, x in vars(self).items() if x is not None}

    def map(self, change: Callable[[np.ndarray, Statistic], Any]) -> "Statistics":
        """Every statistic that is there, changed."""
        return self.of(lambda name, s: None if (x := getattr(self, name)) is None else change(x, s))

    def merge(self, other: "Statistics") -> "Statistics":
        """Adds the other ones, of what both have; on the host."""

        def both(name: str, statistic: Statistic) -> Any:
            mine, theirs = getattr(self, name), getattr(other, name)
            return None if mine is None or theirs is None else statistic.reduce(mine, theirs)

        return self.of(both)

    def zeros(self, num_layers: int) -> "Statistics":
        """Makes the statistics of all layers before anything is added."""
        return self.map(lambda x, _: np.zeros((num_layers, *x.shape[1:]), x.dtype))

    def add(self, first_layer: int, other: "Statistics") -> None:
        """Merge those of some layers, [l, G, …], into these, [L, G, …], in place; on the host."""
        layers = slice(first_layer, first_layer + len(other.count))
        for name, mine in self.arrays().items():
            mine[layers] = DECLARED[name].reduce(mine[layers], getattr(other, name))

    def total(self) -> "Statistics":
        """All groups together: [L, G, …] → [L, …]."""
        return self.map(lambda x, statistic: statistic.reduce.reduce(x, axis=1))

    def joined(self, size: int) -> "Statistics":
        """Each `size` groups in a row together: [L, G, …] → [L, G / size, …]. Co-activations stay as they are: their
        groups are others."""

        def join(x: np.ndarray, statistic: Statistic) -> np.ndarray:
            if statistic.axes.startswith("J"):
                return x
            return statistic.reduce.reduce(x.reshape(len(x), -1, size, *x.shape[2:]), axis=2)

        return self.map(join)

    def group(self, index: int) -> "Statistics":
        """One group's: [L, G, …] → [L, …]; without co-activations where these are of all groups together."""
        groups = self.count.shape[1]
        return self.map(lambda x, _: x[:, index] if x.shape[1] == groups else None)

    def sum_over(self, axis: str) -> "Statistics":
        """All devices of a mapped axis together; on the device, inside the map."""
        return self.map(lambda x, statistic: (lax.pmax if statistic.largest else lax.psum)(x, axis))

    def to_host(self) -> "Statistics":
        """Converts to float64 and int64, so that totals over any number of steps stay exact enough."""
        return self.map(lambda x, statistic: np.asarray(x).astype(np.int64 if statistic.integer else np.float64))

    def check_finite(self, first_layer: int = 0) -> None:
        """StatisticsError names layer and expert of the first NaN or infinity; takes [L, G, …]."""
        finite_LGE = np.ones(self.count.shape, bool)
        for name, statistic in DECLARED.items():
            values = getattr(self, name)
            if statistic.by_expert and not statistic.integer and values is not None:
                finite_LGE &= np.isfinite(values)
        bad = np.argwhere(~finite_LGE)
        if len(bad):
            layer, _, expert = bad[0]
            raise StatisticsError(
                f"the statistics of layer {first_layer + layer}, expert {expert} became NaN or infinite: check this "
                "layer's tensors in the checkpoint, or use --dtype float32 if values overflow"
            )

    def means(self) -> dict[str, np.ndarray]:
        """The means over pairs by their names, float64: the sums over max(1, count)."""
        count = np.maximum(1, self.count)
        return {s.mean: getattr(self, name) / count for name, s in DECLARED.items() if s.mean}


DECLARED: dict[str, Statistic] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Statistics, include_extras=True).items()
}
"""Every statistic by its name, in the order of declaration."""


def layer_statistics(
    routing: Routing, mixture: Mixture, batch: Batch, place: Placement, swaps_Tk: Array | None = None
) -> Statistics:
    """One layer's statistics over the kept tokens of a batch, of the experts that `mixture` is from.

    Where experts are split over devices, E counts those of one device in what is kept by expert. `swaps_Tk` is
    ‖Δ‖²/‖h‖² of each pair, where it was asked for.
    """
    weights_T = batch.weights.reshape(-1)
    kept_T = weights_T != 0
    # Sums are products over some tokens, then over these: one pair after the other would lose digits of float32.
    # Groups stand in the left factor, so that one product sums and splits.
    group_TG = jax.nn.one_hot(batch.groups.reshape(-1), batch.num_groups) * kept_T[:, None]
    weighted_TG = group_TG * weights_T[:, None]
    first, E = place.local(routing.logits_TE.shape[-1])
    chosen_TkE = ((routing.experts_Tk - first)[..., None] == jnp.arange(E)[None, None]) & kept_T[:, None, None]

    def by_expert(values_Tk: Array) -> Array:
        # Selected, not multiplied: NaN · 0 would spread from the expert that made it to all others.
        return jnp.where(chosen_TkE, values_Tk[..., None], 0).sum(1)

    block = math.gcd(len(kept_T), SUMMED_AT_ONCE)

    def summed(values_TX: Array, by_TG: Array = weighted_TG) -> Array:
        by_nMG, values_nMX = (x.reshape(-1, block, x.shape[1]) for x in (by_TG, values_TX))
        # The highest precision: others would round to bfloat16 on TPU.
        return jnp.einsum("nMG,nMX->nGX", by_nMG, values_nMX, precision=lax.Precision.HIGHEST).sum(0)

    gates_TE, norms_TE = by_expert(routing.gates_Tk), by_expert(mixture.norms_Tk)
    saliency_TE = gates_TE * norms_TE
    return Statistics(
        gate_sum=summed(gates_TE),
        norm_sum=summed(norms_TE),
        gate_norm_sum=summed(saliency_TE),
        gate_norm_sq_sum=summed(saliency_TE**2),
        norm_sq_sum=summed(norms_TE**2),
        gate_rank_sum=summed(jnp.where(kept_T[:, None], routing.gates_Tk, 0), group_TG),
        router_entropy_sum=summed(jnp.where(kept_T, entropy(routing.logits_TE), 0)[:, None], group_TG)[:, 0],
        swap_sum=None if swaps_Tk is None else summed(by_expert(swaps_Tk)),
        **_counts_and_maxima(routing, mixture, batch, place),
    )


def _counts_and_maxima(routing: Routing, mixture: Mixture, batch: Batch, place: Placement) -> dict[str, Array]:
    """What loses nothing by being scattered; as products, [T, G, E] would outgrow the layer's weights."""
    all_experts = routing.logits_TE.shape[-1]
    first, E = place.local(all_experts)
    G = batch.num_groups
    groups_T1 = batch.groups.reshape(-1, 1)
    joint_T1 = jnp.array(batch.joint)[groups_T1] if batch.joint else groups_T1
    kept_T1 = (batch.weights != 0).reshape(-1, 1)
    once_T1 = kept_T1.astype(jnp.int32)
    # Ids of other devices' experts are put out of range, and what they would add is dropped.
    here_Tk = routing.experts_Tk - first
    here_Tk = jnp.where(here_Tk >= 0, here_Tk, E)
    experts_T1k = routing.experts_Tk[:, None, :]
    together_Tkk = once_T1[:, :, None] * (routing.experts_Tk[:, :, None] != experts_T1k)
    bins_Tk = jnp.minimum((routing.gates_Tk * GATE_BINS).astype(jnp.int32), GATE_BINS - 1)

    def counts(*shape: int) -> Array:
        return jnp.zeros((G, *shape), jnp.int32)

    def peak(values_Tk: Array) -> Array:
        return jnp.zeros((G, E)).at[groups_T1, here_Tk].max(jnp.where(kept_T1, values_Tk, 0), mode="drop")

    return {
        "count": counts(E).at[groups_T1, here_Tk].add(once_T1, mode="drop"),
        "lead_count": counts(E).at[groups_T1, here_Tk[:, :1]].add(once_T1, mode="drop"),
        "norm_max": peak(mixture.norms_Tk),
        "activation_max": peak(mixture.peaks_Tk),
        "coactivation": jnp.zeros((batch.num_joint, E, all_experts), jnp.int32)
        .at[joint_T1[:, :, None], here_Tk[:, :, None], experts_T1k]
        .add(together_Tkk, mode="drop"),
        "tokens": counts().at[groups_T1[:, 0]].add(once_T1[:, 0]),
        "gate_histogram": counts(GATE_BINS).at[groups_T1, bins_Tk].add(once_T1),
        "computed": place.sum_experts(counts().at[groups_T1[:, 0]].add(mixture.computed_Tk.sum(1))),
    }
