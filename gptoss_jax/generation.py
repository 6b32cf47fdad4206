"""Text from a model: a prefill of all prompts at once, then one token a step for all rows. Letters: see `config`."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .config import SLIDING, Config
from .data import tokens as tokenizing
from .data.conversation import Conversation
from .data.harmony import CALL, RETURN, HarmonyText
from .data.spellings import as_seen
from .data.template import Template
from .devices.placement import here
from .errors import DataError, TokenizerError
from .files.paths import local_folder, read_json
from .network import cache, rope
from .network.batch import Tokens
from .network.cache import Cache
from .network.model import Head, Layer
from .network.source import Source, load_part
from .run.options import Answering, Sampling
from .run.steps import float32_is_float32

CAPACITY_STEP = 128  # tokens: caches grow by so many, so that few lengths are compiled
STEPS_AT_ONCE = 16  # tokens between two looks at what was generated


class Network(NamedTuple):
    """The model with a module for each layer: a step of one token would copy its weights out of a stack."""

    embedding: Float[Array, "V D"]
    layers: tuple[Layer, ...]
    head: Head


class State(NamedTuple):
    """Rows between two steps."""

    logits: Float[Array, "B V"]
    """The logits of the next token."""
    positions: Int[Array, " B"]
    """The position of the next token."""
    done: Bool[Array, " B"]
    caches: tuple[Cache, ...]


def load(source: Source, dtype: Any) -> Network:
    """The network with all weights on the default device."""
    config = source.config

    def layer() -> Layer:
        return Layer(config, rngs=nnx.Rngs(0))

    embedding = load_part(source, lambda: {"embedding": jnp.zeros((config.vocab_size, config.hidden_size))}, dtype)
    layers = tuple(load_part(source, layer, dtype, f"layers/{i}/") for i in range(config.num_layers))
    return Network(embedding["embedding"], layers, load_part(source, lambda: Head(config, rngs=nnx.Rngs(0)), dtype))


@float32_is_float32
def step(
    network: Network, tokens: Tokens, caches: Sequence[Cache], config: Config
) -> tuple[Float[Array, "B S D"], tuple[Cache, ...]]:
    """Tokens through all layers: the last one's output, and the caches."""
    tables, place = rope.tables(config, tokens.positions), here()
    x_BSD = network.embedding[tokens.ids]
    after: list[Any] = []
    for layer, kind, before in zip(network.layers, config.layer_types, caches, strict=True):
        output = layer(x_BSD, tokens, tables, jnp.array(kind == SLIDING), place, cache=before)
        x_BSD = output.hidden
        after.append(output.cache)
    return x_BSD, tuple(after)


@partial(jax.jit, static_argnames=("config", "capacity"))
def prefill(
    network: Network, token_ids: Int[Array, "B S"], lengths: Int[Array, " B"], config: Config, capacity: int
) -> State:
    """Prompts, padded on the right, through the network; room for `capacity` tokens a row."""
    B, S = token_ids.shape
    kinds, dtype = config.layer_types, network.embedding.dtype
    caches = [cache.empty(config, B, capacity, kind, dtype) for kind in kinds]
    positions = jnp.broadcast_to(jnp.arange(S), (B, S))
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    x_BSD, caches = step(network, Tokens(token_ids, positions, segment_ids), caches, config)
    last_BD = x_BSD[jnp.arange(B), lengths - 1]
    return State(logits_of(network.head, last_BD), lengths, jnp.zeros(B, bool), caches)


@partial(jax.jit, static_argnames=("sampling", "config", "stop_ids", "steps"), donate_argnames="state")
def decode(
    network: Network, state: State, sampling: Sampling, config: Config, stop_ids: tuple[int, ...], steps: int
) -> tuple[State, Int[Array, "B steps"]]:
    """The next tokens of all rows, −1 behind a row's stop."""

    def one_token(state: State, _: None) -> tuple[State, Array]:
        token_B = sample(state.logits, state.positions, sampling)
        emitted_B = jnp.where(state.done, -1, token_B)
        full_B = state.positions + 1 >= config.max_position
        done_B = state.done | full_B | jnp.isin(token_B, jnp.array(stop_ids, jnp.int32))
        # Rows that are done go on in segment 0, as padding, whose experts do not run.
        tokens = Tokens(token_B[:, None], state.positions[:, None], jnp.where(done_B, 0, 1)[:, None])
        x_B1D, caches = step(network, tokens, state.caches, config)
        positions = jnp.where(done_B, state.positions, state.positions + 1)
        return State(logits_of(network.head, x_B1D[:, 0]), positions, done_B, caches), emitted_B

    state, tokens_NB = lax.scan(one_token, state, length=steps)
    return state, tokens_NB.T


def logits_of(head: Head, x_BD: Float[Array, "B D"]) -> Float[Array, "B V"]:
    """What follows the last layer's output."""
    return float32_is_float32(head.logits)(head.final_norm(x_BD))


def sample(logits_BV: Float[Array, "B V"], positions_B: Int[Array, " B"], sampling: Sampling) -> Int[Array, " B"]:
    """A token a row. What is drawn depends on the seed, the row and the position, not on the steps at once."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)
    B, V = logits_BV.shape
    kept = sampling.top_k if 0 < sampling.top_k < V else V
    # The largest is 0, and stays so however small the temperature is.
    temperature = max(sampling.temperature, float(jnp.finfo(jnp.float32).tiny))
    ordered_BK, ids_BK = (logits_BV - logits_BV.max(-1, keepdims=True)) / temperature, None
    if kept < V or sampling.top_p < 1:
        ordered_BK, ids_BK = lax.top_k(ordered_BK, kept)
        before_BK = jnp.cumsum(jax.nn.softmax(ordered_BK, axis=-1), axis=-1)
        before_BK = jnp.pad(before_BK, ((0, 0), (1, 0)))[:, :-1]
        # The first one always stays: nothing stands before it.
        ordered_BK = jnp.where(before_BK < sampling.top_p, ordered_BK, -jnp.inf)
    keys_B = jax.vmap(
        lambda row, position: jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), row), position)
    )(jnp.arange(B), positions_B)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, ordered_BK)
    return drawn_B if ids_BK is None else ids_BK[jnp.arange(B), drawn_B]


def generate(
    network: Network,
    config: Config,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Sequence[int],
) -> Iterator[np.ndarray]:
    """The next tokens of all rows, [B, up to STEPS_AT_ONCE] at a time, −1 behind a row's end.

    A row ends with the first of `stop_ids`, with `max_new_tokens`, or where the model's context is full. DataError
    where a prompt is empty or leaves no room in the context.
    """
    check_room(prompts, config)
    longest = max(map(len, prompts))
    token_ids = np.zeros((len(prompts), _rounded(longest)), np.int32)
    for row, prompt in zip(token_ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    capacity = min(_rounded(longest + max_new_tokens), config.max_position)
    state = prefill(network, token_ids, lengths, config, capacity)
    for first in range(0, max_new_tokens, STEPS_AT_ONCE):
        state, tokens_BN = decode(network, state, sampling, config, tuple(stop_ids), STEPS_AT_ONCE)
        yield np.asarray(tokens_BN)[:, : max_new_tokens - first]
        if bool(state.done.all()):
            return


class Reply(NamedTuple):
    """What a model answers to one prompt."""

    token_ids: list[int]
    text: str
    """The text with harmony's marks."""
    parts: list[tuple[str, str]]
    """Channel and content of each message; empty where the model does not speak harmony."""
    ended: bool
    """Whether it ended by itself."""


class Answer:
    """Replies to some conversations, which grow while they are generated."""

    def __init__(
        self,
        source: Source,
        conversations: Sequence[Conversation | str],
        answering: Answering,
        sampling: Sampling,
        dtype: str,
        remarks: dict[str, None],
    ):
        """`conversations` may be harmony text, which ends where the model is to go on. `remarks` are what a user should
        know of how they were taken; more may come. TokenizerError or DataError where one cannot be written."""
        self.source, self.answering, self.sampling, self.dtype = source, answering, sampling, dtype
        self.remarks = remarks
        with local_folder(source.folder) as folder:
            self.tokenizer = tokenizing.load_tokenizer(folder)
            self.stop_ids = read_stop_ids(folder, self.tokenizer)
        written = [self._written(conversation, number) for number, conversation in enumerate(conversations, 1)]
        self.prompts = [tokenizing.token_ids(text, self.tokenizer, source.config.vocab_size) for text in written]
        check_room(self.prompts, source.config)
        self.token_ids: list[list[int]] = [[] for _ in conversations]

    def _written(self, conversation: Conversation | str, number: int) -> HarmonyText:
        if isinstance(conversation, str):
            return HarmonyText(conversation)
        say, asked = self.remarks.setdefault, conversation
        if not self.answering.keep_reply:
            asked = conversation.without_reply()
        if len(asked.messages) < len(conversation.messages):
            say("the reply with which a conversation ends is left out (--keep-reply keeps it)")
        asked = as_seen(asked, generate=True, say=say)
        try:
            return Template(self.tokenizer).write(asked, self.answering.reasoning_effort, generate=True)
        except DataError as error:
            raise DataError(f"prompt {number}: {error}") from None

    def grow(self) -> Iterator[None]:
        """Generate to the end; after each step the replies are longer."""
        network, config = load(self.source, self.dtype), self.source.config
        for tokens_BN in generate(
            network, config, self.prompts, self.answering.max_new_tokens, self.sampling, self.stop_ids
        ):
            for reply, tokens in zip(self.token_ids, tokens_BN, strict=True):
                reply += [int(token) for token in tokens if token >= 0]
            yield

    def reply(self, number: int) -> Reply:
        """The reply to a conversation as it is now."""
        ids = self.token_ids[number]
        text = self.tokenizer.decode(ids)
        parts = [(part.channel, part.content) for part in tokenizing.messages_in_ids(ids, self.tokenizer)]
        return Reply(list(ids), text, parts, bool(ids) and ids[-1] in self.stop_ids)


def check_room(prompts: Sequence[np.ndarray], config: Config) -> None:
    """DataError where a prompt is empty or fills the context."""
    for number, prompt in enumerate(prompts, 1):
        if not 0 < len(prompt) < config.max_position:
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens, the model's context is {config.max_position}: give at "
                "least one token, and leave room for what is generated"
            )


def read_stop_ids(folder: Path, tokenizer: Any) -> list[int]:
    """The ids that end a reply: harmony's own, and those that generation_config.json lists; where there is none those
    of config.json, or the tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        raw = read_json(file) if file.exists() else {}
        listed = raw.get("eos_token_id") if isinstance(raw, dict) else None
        if listed is not None:
            break
    else:
        listed = tokenizer.eos_token_id
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise TokenizerError(f"{file}: eos_token_id is {listed!r}, expected ids: copy the file of the original model")
    own = {token: number for number, token in ((n, str(t)) for n, t in tokenizer.added_tokens_decoder.items())}
    found = dict.fromkeys([*(own[mark] for mark in (RETURN, CALL) if mark in own), *ids])
    if not found:
        raise TokenizerError(
            f"{folder}: nothing says what ends a reply: copy generation_config.json of the original model"
        )
    return list(found)


def _rounded(tokens: int) -> int:
    return -(-tokens // CAPACITY_STEP) * CAPACITY_STEP
