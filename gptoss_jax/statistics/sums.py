"""The statistics of experts: what is summed, how sums merge, what is derived. Letters: see `config`.

All sums run over kept (token, chosen expert) pairs, with g the gate, n = ‖f_j(x)‖₂ of the expert's
output before the gate, and w the token's weight (1 unless asked otherwise). Sums over tokens merge
by addition, in any grouping: over batches, hosts, domains and runs.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from ..devices.placement import Placement
from ..errors import StatisticsError
from ..network.batch import Batch
from ..network.experts import Mixture
from ..network.router import Routing, entropy

STATISTICS = "statistics.safetensors"
GATE_BINS = 200  # of [0, 1]; the published usage tables of gpt-oss-20b have bins of 0.005
SUMMED_AT_ONCE = 256  # tokens
MAXIMA = {"norm_max", "activation_max"}  # merged by the larger; all other statistics are sums
INTEGERS = {"count", "coactivation", "tokens", "gate_histogram", "computed"}
MAX_DOMAINS = 256  # co-activations by domain are [L, G, E, E]; an id column taken for domains has thousands


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Statistics:
    """Statistics by domain; one step's are float32 and int32 on the device, totals float64 and int64 on
    the host. A scan over layers stacks them to [L, G, …]."""

    count: Any
    """[G, E] pairs."""
    gate_sum: Any
    """[G, E] Σ w·g."""
    norm_sum: Any
    """[G, E] Σ w·n."""
    gate_norm_sum: Any
    """[G, E] Σ w·g·n."""
    gate_norm_sq_sum: Any
    """[G, E] Σ w·(g·n)²."""
    norm_sq_sum: Any
    """[G, E] Σ w·n²."""
    norm_max: Any
    """[G, E] max n."""
    activation_max: Any
    """[G, E] max |f_j(x)|."""
    coactivation: Any
    """[G, E, E] tokens that chose both experts; the diagonal is 0."""
    tokens: Any
    """[G] kept tokens."""
    gate_rank_sum: Any
    """[G, k] Σ of the gate of rank 1…k."""
    gate_histogram: Any
    """[G, GATE_BINS] pairs by gate."""
    router_entropy_sum: Any
    """[G] Σ entropy of the softmax over all router logits, in nats."""
    computed: Any
    """[G] pairs whose expert ran, kept or not: k for each token that is no padding, unless some were dropped."""

    def merge(self, other: "Statistics") -> "Statistics":
        """Both together; on the host."""
        return Statistics(**{name: _reducer(name)(mine, getattr(other, name)) for name, mine in vars(self).items()})

    def zeros(self, num_layers: int) -> "Statistics":
        """Those of all layers before anything is added; 0 is the least that a maximum can be."""
        return jax.tree.map(lambda x: np.zeros((num_layers, *x.shape[1:]), x.dtype), self)

    def add(self, first_layer: int, other: "Statistics") -> None:
        """Merge those of some layers, [l, G, …], into these, [L, G, …], in place; on the host."""
        layers = slice(first_layer, first_layer + len(other.count))
        for name, mine in vars(self).items():
            mine[layers] = _reducer(name)(mine[layers], getattr(other, name))

    def total(self) -> "Statistics":
        """All domains together: [L, G, …] → [L, …]."""
        return Statistics(**{name: _reducer(name).reduce(mine, axis=1) for name, mine in vars(self).items()})

    def domain(self, index: int) -> "Statistics":
        """One domain's: [L, G, …] → [L, …]."""
        return jax.tree.map(lambda x: x[:, index], self)

    def sum_over(self, axis: str) -> "Statistics":
        """All devices of a mapped axis together; on the device, inside the map."""
        return Statistics(**{n: (lax.pmax if n in MAXIMA else lax.psum)(mine, axis) for n, mine in vars(self).items()})

    def to_host(self) -> "Statistics":
        """In float64 and int64, so that totals over any number of steps stay exact enough."""

        def widen(x: Any) -> np.ndarray:
            array = np.asarray(x)
            return array.astype(np.int64 if np.issubdtype(array.dtype, np.integer) else np.float64)

        return jax.tree.map(widen, self)

    def check_finite(self, first_layer: int = 0) -> None:
        """StatisticsError names layer and expert of the first NaN or infinity; takes [L, G, …]."""
        finite_LGE = np.isfinite(self.gate_norm_sum)
        for name in ("gate_sum", "norm_sum", "gate_norm_sq_sum", "norm_sq_sum", "norm_max", "activation_max"):
            finite_LGE &= np.isfinite(getattr(self, name))
        bad = np.argwhere(~finite_LGE)
        if len(bad):
            layer, _, expert = bad[0]
            raise StatisticsError(
                f"the statistics of layer {first_layer + layer}, expert {expert} became NaN or infinite: check this "
                "layer's tensors in the checkpoint, or use --dtype float32 if values overflow"
            )


# Shapes of all statistics of a model, b the bins of gates.
_BY_EXPERT = ("count", "gate_sum", "norm_sum", "gate_norm_sum", "gate_norm_sq_sum", "norm_sq_sum", *sorted(MAXIMA))
SHAPES = {
    **dict.fromkeys(_BY_EXPERT, "LGE"),
    "coactivation": "LGEE",
    "tokens": "LG",
    "gate_rank_sum": "LGk",
    "gate_histogram": "LGb",
    "router_entropy_sum": "LG",
    "computed": "LG",
}


def _reducer(name: str) -> np.ufunc:
    return np.maximum if name in MAXIMA else np.add


def layer_statistics(routing: Routing, mixture: Mixture, batch: Batch, place: Placement) -> Statistics:
    """One layer's statistics over the kept tokens of a batch, of the experts that `mixture` is from.

    Where experts are split over devices, E counts those of one device in what is kept by expert.
    """
    weights_T = batch.weights.reshape(-1)
    kept_T = weights_T != 0
    # Sums are products over some tokens, then over these: one pair after the other would lose digits of float32.
    # Domains stand in the left factor, so that one product sums and splits.
    domain_TG = jax.nn.one_hot(batch.domains.reshape(-1), batch.num_domains) * kept_T[:, None]
    weighted_TG = domain_TG * weights_T[:, None]
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
        gate_rank_sum=summed(jnp.where(kept_T[:, None], routing.gates_Tk, 0), domain_TG),
        router_entropy_sum=summed(jnp.where(kept_T, entropy(routing.logits_TE), 0)[:, None], domain_TG)[:, 0],
        **_counts_and_maxima(routing, mixture, batch, place),
    )


def _counts_and_maxima(routing: Routing, mixture: Mixture, batch: Batch, place: Placement) -> dict[str, Array]:
    """What loses nothing by being scattered; as products, [T, G, E] would outgrow the layer's weights."""
    all_experts = routing.logits_TE.shape[-1]
    first, E = place.local(all_experts)
    G = batch.num_domains
    domains_T1 = batch.domains.reshape(-1, 1)
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
        return jnp.zeros((G, E)).at[domains_T1, here_Tk].max(jnp.where(kept_T1, values_Tk, 0), mode="drop")

    return {
        "count": counts(E).at[domains_T1, here_Tk].add(once_T1, mode="drop"),
        "norm_max": peak(mixture.norms_Tk),
        "activation_max": peak(mixture.peaks_Tk),
        "coactivation": counts(E, all_experts)
        .at[domains_T1[:, :, None], here_Tk[:, :, None], experts_T1k]
        .add(together_Tkk, mode="drop"),
        "tokens": counts().at[domains_T1[:, 0]].add(once_T1[:, 0]),
        "gate_histogram": counts(GATE_BINS).at[domains_T1, bins_Tk].add(once_T1),
        "computed": place.sum_experts(counts().at[domains_T1[:, 0]].add(mixture.computed_Tk.sum(1))),
    }


def means(statistics: Statistics) -> dict[str, np.ndarray]:
    """gate_mean, norm_mean and saliency_mean: the sums over max(1, count), float64 [L, E]."""
    count = np.maximum(1, statistics.count)
    return {
        "gate_mean": statistics.gate_sum / count,
        "norm_mean": statistics.norm_sum / count,
        "saliency_mean": statistics.gate_norm_sum / count,
    }
