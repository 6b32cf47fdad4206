"""Replies of a target whose next tokens a draft model proposes. Letters: see `config`; N tokens are drafted, M = N + 1.

Both models have caches of all that was accepted. What a rejected token left there stands at positions that no query
sees before other tokens take its place; sliding layers have N slots beside their window, so that these take no key
that is still seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax.config import SLIDING, Config
from gptoss_jax.devices.placement import Placement, here
from gptoss_jax.generation.decoder import Prompt, padded_length
from gptoss_jax.generation.steps import How, Network, Prompts, State, empty, prefill
from gptoss_jax.network import cache, rope
from gptoss_jax.network.batch import Tokens
from gptoss_jax.network.cache import Cache
from gptoss_jax.network.model import embed
from gptoss_jax.run.options import Sampling
from gptoss_jax.run.steps import float32_is_float32

from .rule import Judged, distribution, judge


class Going(NamedTuple):
    """Rows between two rounds."""

    tokens: Int[Array, " B"]
    """The last one of each reply, which neither model has seen."""
    positions: Int[Array, " B"]
    target: tuple[Cache, ...]
    draft: tuple[Cache, ...]


@dataclass
class Reply:
    """A reply, and how its draft fared."""

    token_ids: list[int] = field(default_factory=list)
    rounds: int = 0
    """Steps of the target behind the prompt."""
    judged: int = 0
    """Drafted tokens up to the first that was rejected, or that the reply ends with."""
    accepted: int = 0


@float32_is_float32
def scored(
    network: Network, tokens: Tokens, caches: Sequence[Cache], config: Config, place: Placement
) -> tuple[Float[Array, "B S V"], tuple[Cache, ...]]:
    """The logits behind each of some tokens that follow those in the caches, and the caches with them."""
    tables = rope.tables(config, tokens.positions)
    x_BSD = embed(tokens.ids, network.embedding, config.vocab_size, place)
    after = []
    for layer, held, kind in zip(network.layers, caches, config.layer_types, strict=True):
        output = layer(x_BSD, tokens, tables, jnp.array(kind == SLIDING), place, cache=held, follows=True)
        assert output.cache is not None  # one was given
        x_BSD = output.hidden
        after.append(output.cache)
    return network.head.logits(network.head.final_norm(x_BSD)), tuple(after)


def one_round(
    target: Network,
    draft: Network,
    going: Going,
    active_B: Bool[Array, " B"],
    key: Array,
    config: Config,
    place: Placement,
    length: int,
    temperature: float,
) -> tuple[Going, Int[Array, "B N"], Judged]:
    """Draft `length` tokens of each row and judge them by one step of the target."""
    segments_B = active_B.astype(jnp.int32)

    def one_token(carried: tuple[Array, Array, tuple[Cache, ...]], key: Array) -> tuple[tuple, tuple[Array, Array]]:
        tokens_B, positions_B, caches = carried
        tokens = Tokens(tokens_B[:, None], positions_B[:, None], segments_B[:, None])
        logits_B1V, caches = scored(draft, tokens, caches, config, place)
        draft_BV = distribution(logits_B1V[:, 0], temperature)
        next_B = jax.random.categorical(key, jnp.log(draft_BV)).astype(jnp.int32)
        return (next_B, positions_B + 1, caches), (next_B, draft_BV)

    judging, drafting = jax.random.split(key)
    # One step more than is drafted: the last token goes into the draft's caches as well.
    begin = going.tokens, going.positions, going.draft
    (_, _, drafts), (drafted_MB, draft_MBV) = lax.scan(one_token, begin, jax.random.split(drafting, length + 1))
    drafted_BN, draft_BNV = drafted_MB[:-1].T, jnp.moveaxis(draft_MBV[:-1], 0, 1)
    ids_BM = jnp.concatenate([going.tokens[:, None], drafted_BN], axis=1)
    positions_BM = going.positions[:, None] + jnp.arange(length + 1)[None]
    tokens = Tokens(ids_BM, positions_BM, jnp.broadcast_to(segments_B[:, None], ids_BM.shape))
    logits_BMV, targets = scored(target, tokens, going.target, config, place)
    judged = judge(distribution(logits_BMV, temperature), draft_BNV, drafted_BN, judging)
    moved_B = jnp.where(active_B, judged.accepted + 1, 0)
    tokens_B = jnp.where(active_B, judged.following, going.tokens)
    return Going(tokens_B, going.positions + moved_B, targets, drafts), drafted_BN, judged


class Speculative:
    """A target and its draft, on the default device."""

    def __init__(self, target: Network, draft: Network, config: Config, length: int, sampling: Sampling):
        """`length` tokens are drafted at a time; of `sampling` the temperature and the seed count."""
        assert sampling.top_k == 0 and sampling.top_p == 1, "drawn from all tokens"
        self.target, self.draft, self.config, self.length = target, draft, config, length
        self.how, self.key = How(config, sampling, ()), jax.random.key(sampling.seed)
        temperature = float(sampling.temperature)
        fixed = partial(one_round, config=config, place=here(), length=length, temperature=temperature)
        self._round = jax.jit(fixed, donate_argnames="going")
        self._prefill = jax.jit(partial(prefill, how=self.how, place=here()))

    def replies(self, prompts: Sequence[Prompt], stop_ids: Sequence[int]) -> list[Reply]:
        """The replies to prompts, all side by side, each up to a stop or its limit."""
        going = self._begun(prompts)
        found = [Reply([token]) for token in np.asarray(going.tokens).tolist()]
        for number in range(max(prompt.limit for prompt in prompts)):
            active = [
                reply.token_ids[-1] not in stop_ids and len(prompt.token_ids) + len(reply.token_ids) < prompt.limit
                for reply, prompt in zip(found, prompts, strict=True)
            ]
            if not any(active):
                break
            key = jax.random.fold_in(self.key, number)
            going, drafted_BN, judged = self._round(self.target, self.draft, going, jnp.array(active), key)
            drafts, accepted, following = (np.asarray(x).tolist() for x in (drafted_BN, *judged))
            for row in np.flatnonzero(active).tolist():
                room = prompts[row].limit - len(prompts[row].token_ids) - len(found[row].token_ids)
                _grow(found[row], drafts[row], accepted[row], following[row], room, stop_ids)
        return found

    def _begun(self, prompts: Sequence[Prompt]) -> Going:
        """Both models behind the prompts, and the first token, which is the target's."""
        B, lengths = len(prompts), np.array([len(prompt.token_ids) for prompt in prompts], np.int32)
        ids_BS = np.zeros((B, padded_length(int(lengths.max()))), np.int32)
        for row, prompt in zip(ids_BS, prompts, strict=True):
            row[: len(prompt.token_ids)] = prompt.token_ids
        limits, numbers = (np.array([prompt[i] for prompt in prompts], np.int32) for i in (2, 0))
        asked = Prompts(ids_BS, lengths, np.arange(B, dtype=np.int32), limits, numbers)
        capacity = max(int(limits.max()) + self.length, ids_BS.shape[1])
        states = []
        for network in (self.target, self.draft):
            dtype = network.embedding.dtype
            kinds = self.config.layer_types
            caches = tuple(cache.empty(self.config, B, capacity, kind, dtype, self.length) for kind in kinds)
            states.append(self._prefill(network, State(empty(self.how, B), caches), asked)[0])
        rows = states[0].rows
        return Going(rows.tokens, rows.positions, states[0].caches, states[1].caches)


def _grow(reply: Reply, drafted: list[int], accepted: int, following: int, room: int, stop_ids: Sequence[int]) -> None:
    """The reply with what a round gave, up to a stop or where there is no more room."""
    said = [*drafted[:accepted], following][:room]
    ends = [at for at, token in enumerate(said) if token in stop_ids]
    said = said[: ends[0] + 1] if ends else said
    reply.token_ids += said
    reply.rounds += 1
    reply.judged += min(len(said), len(drafted))
    reply.accepted += min(len(said), accepted)
