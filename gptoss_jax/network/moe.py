"""The mixture-of-experts block of a layer: router, experts, and the statistics of both."""

from flax import nnx
from jaxtyping import Array, Float, Int

from ..config import Config
from ..devices.placement import Placement
from ..statistics.sums import Statistics, layer_statistics
from .batch import Batch
from .experts import Experts
from .router import Router, Routing


class MoE(nnx.Module):
    """Router and experts. The statistics come out of the product that makes the output."""

    def __init__(self, config: Config, weights: str = "bf16", *, rngs: nnx.Rngs):
        self.router = Router(config, rngs=rngs)
        self.experts = Experts(config, weights, rngs=rngs)

    def __call__(
        self, x_BSD: Float[Array, "B S D"], batch: Batch, place: Placement, layer: Int[Array, ""] | None = None
    ) -> tuple[Float[Array, "B S D"], Routing, Statistics]:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        routing = self.router(x_TD, place)
        mixture = self.experts(x_TD, routing, batch.segment_ids.reshape(-1) > 0, place, layer)
        statistics = layer_statistics(routing, mixture, batch, place)
        output_TD = place.sum_experts(mixture.output_TD, x_TD.dtype)
        return output_TD.reshape(x_BSD.shape).astype(x_BSD.dtype), routing, statistics
