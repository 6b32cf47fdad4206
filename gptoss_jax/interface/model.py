"""A model that is open: forwards of prompts as arrays. Letters: see `config`."""

import warnings
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.sources import open_source

from ..config import Config, Form
from ..data import tokens
from ..data.batching import Document, padded_lengths, stack
from ..data.harmony import HarmonyText
from ..data.spellings import harmony_of
from ..data.template import Template
from ..devices.placement import Placement, here
from ..errors import InputError, OptionError
from ..files.paths import AnyPath, is_path, local_folder
from ..network.model import GptOss, Interventions
from ..network.source import Masked, Source, load
from ..run.forward import Forward, forward
from ..run.kinds import DTYPES, FORMS
from ..selection.keep_sets import KeepSets


class Model:
    """A GPT-OSS whose weights are read when they are needed.

    Example:
        >>> import gptoss_jax as gj
        >>> model = gj.open("nano")
        >>> out = model.forward("What is 12 + 7?")
        >>> out.experts.shape == (model.config.num_layers, 1, out.logits.shape[1], model.config.top_k)
        True
    """

    def __init__(self, source: Source, name: str, dtype: str = "bfloat16", weights: Form = "bf16"):
        """`name` is what a user calls it; `dtype` is that of weights and products, `weights` the form of the experts in
        device memory. OptionError where these are none."""
        for flag, value, kind in (("--dtype", dtype, DTYPES), ("--weights", weights, FORMS)):
            if not kind.accepts(value):
                raise OptionError(f"{flag} is {value!r}: give {kind.expected}")
        self.source, self.name, self.dtype, self.weights = source, name, dtype, weights

    @property
    def config(self) -> Config:
        """Sizes and constants."""
        return self.source.config

    @cached_property
    def network(self) -> GptOss:
        """The Flax module with all weights, on the default device; a pytree, whose leaves are the parameters."""
        return load(self.source, self.dtype, form=self.weights)

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's own, as transformers reads it."""
        with local_folder(self.source.folder) as folder:
            return tokens.load_tokenizer(Path(folder))

    def token_ids(self, inputs: Any) -> list[np.ndarray]:
        """The token ids of a text, of messages, of ids, or of a list of these: int32 [length] of each.

        A text is taken as it stands, with harmony's marks where it has some, as in a profile's text column. Messages,
        which are objects with role and content, are written as a profile's rows are; where the
        last one is not the assistant's, the marks follow with which its reply begins.
        """
        rows = inputs if _is_list(inputs) else [inputs]
        if not rows:
            raise InputError("the list of inputs is empty: give a text, messages, token ids, or a list of these")
        return [self._ids(row, number) for number, row in enumerate(rows, 1)]

    def _ids(self, row: Any, number: int) -> np.ndarray:
        if _is_messages(row):
            generate = row[-1].get("role") != "assistant"
            row = harmony_of(row, Template(self.tokenizer), warnings.warn, generate=generate)
        if isinstance(row, str):
            row = HarmonyText(row)
        if isinstance(row, HarmonyText):
            ids = tokens.token_ids(row, self.tokenizer, self.config.vocab_size)
        else:
            array = np.asarray(row)
            if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
                what = f"input {number} is {type(row).__name__} {list(array.shape)} of {array.dtype}"
                raise InputError(f"{what}: give a text, messages, whole numbers [length], or a list of these")
            if array.size and not 0 <= array.min() <= array.max() < self.config.vocab_size:
                raise InputError(f"input {number} holds a token id outside of 0 to {self.config.vocab_size - 1}")
            ids = array.astype(np.int32)
        if not 0 < len(ids) <= self.config.max_position:
            raise InputError(f"input {number} has {len(ids)} tokens: give 1 to {self.config.max_position}")
        return ids

    def forward(
        self,
        inputs: Any,
        gates: Any = None,
        steering: Any = None,
        network: GptOss | None = None,
    ) -> Forward:
        """Logits, hidden states, routing and saliency of one row or several, which are padded on the right.

        Everything that it returns is a JAX array, and can be differentiated with respect to `gates`, `steering` and
        `network`; where JAX traces one of these, loops run in the form that has gradients.

        Args:
            inputs: a text, messages, token ids, or a list of these; `token_ids` says how they are read.
            gates: [L, B, S, k], in place of the router's for the experts that it chose; 0 silences one, and no other
                takes over.
            steering: [L, B, S, D], added to the residual stream before each layer; its gradient at 0 is that with
                respect to the layers' inputs.
            network: in place of `self.network`, of the same sizes.

        InputError names an argument of a wrong type or shape before anything is computed.

        Example:
            >>> import jax, gptoss_jax as gj
            >>> model = gj.open("nano", dtype="float32")
            >>> out = model.forward("2 + 2 =")
            >>> logit = lambda gates: model.forward("2 + 2 =", gates=gates).logits[0, -1].max()
            >>> jax.grad(logit)(out.gates).shape == out.gates.shape
            True
        """
        rows = self.token_ids(inputs)
        B, S, L = len(rows), max(map(len, rows)), self.config.num_layers
        self._check("gates", gates, (L, B, S, self.config.top_k))
        self._check("steering", steering, (L, B, S, self.config.hidden_size))
        network = self.network if network is None else network
        documents = [Document(ids, np.ones(len(ids), np.float32)) for ids in rows]
        # Padded to few lengths, so that prompts of other lengths seldom compile anew; cut to S again at the end.
        (length,) = padded_lengths(documents, B, self.config.max_position)
        tokens = stack([[document] for document in documents], B, length, num_groups=1).tokens
        interventions = Interventions(*(None if x is None else _widened(x, length - S) for x in (gates, steering)))
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((network, interventions)))
        place = Placement(here().platform, differentiable=True) if traced else here()
        return _cut(forward(network, tokens, place, interventions), S)

    def masked(self, dropped: Any) -> "Model":
        """The model without some experts: their router logits are −∞ before top-k, so that others take over.

        `dropped` is {layer: experts to drop}, or keep-sets: for each layer the experts that stay. InputError where it
        names a layer or an expert that does not exist, RankingError where keep-sets do not fit or too few experts stay.

        Example:
            >>> import gptoss_jax as gj
            >>> out = gj.open("nano").masked({3: [5]}).forward("2 + 2 =")
            >>> bool((out.experts[3] == 5).any())
            False
        """
        layers = getattr(dropped, "layers", dropped)
        if isinstance(layers, Mapping):
            layers = self._without(layers)
        return Model(Masked(self.source, layers), f"{self.name}, masked", self.dtype, self.weights)

    def _without(self, dropped: Mapping[Any, Any]) -> list[list[int]]:
        L, E = self.config.num_layers, self.config.num_experts
        for layer, experts in dropped.items():
            is_known = isinstance(experts, Collection) and all(expert in range(E) for expert in experts)
            if layer not in range(L) or not is_known:
                known = f"give lists of the experts 0 to {E - 1} for the layers 0 to {L - 1}"
                raise InputError(f"masked drops {experts!r} of layer {layer}: {known}")
        return [[e for e in range(E) if e not in dropped.get(layer, ())] for layer in range(L)]

    def _check(self, name: str, value: Any, shape: tuple[int, ...]) -> None:
        if value is not None and getattr(value, "shape", None) != shape:
            found = list(value.shape) if hasattr(value, "shape") else type(value).__name__
            raise InputError(f"{name} is {found}: give an array {list(shape)}")


def _is_messages(row: Any) -> bool:
    return isinstance(row, list | tuple) and bool(row) and all(isinstance(message, Mapping) for message in row)


def _is_list(inputs: Any) -> bool:
    """Whether these are several inputs: a list that is neither messages nor the ids of one row."""
    is_one = isinstance(inputs, str) or _is_messages(inputs) or not isinstance(inputs, list | tuple)
    return not is_one and not (len(inputs) > 0 and all(isinstance(x, int | np.integer) for x in inputs))


def _widened(x_LBSX: Any, more: int) -> jax.Array:
    """The array with so many further positions, which hold zeros."""
    return jnp.pad(x_LBSX, ((0, 0), (0, 0), (0, more), (0, 0)))


def _cut(out: Forward, length: int) -> Forward:
    """The first `length` positions."""
    tokens = jax.tree.map(lambda x_BS: x_BS[:, :length], out.tokens)
    by_layer = (x[:, :, :length] for x in (out.hidden, out.router_logits, out.experts, out.gates, out.norms))
    return Forward(tokens, out.logits[:, :length], *by_layer)


def open(model: str | AnyPath, dtype: str = "bfloat16", weights: Form = "bf16") -> Model:
    """Open a model: a folder in Hugging Face form, an Orbax checkpoint of this project, a hub id, or nano.

    Weights are read when they are needed. CheckpointError or ConfigError where it is no sound GPT-OSS.

    Example:
        >>> import gptoss_jax as gj
        >>> gj.open("nano").config.num_experts
        16
    """
    return Model(open_source(str(model)), str(model), dtype, weights)


def open_masked(model: str | AnyPath, keep_sets: AnyPath | None) -> Model:
    """Open a model, of which the keep-sets of a file are left, where one is given."""
    opened = open(model)
    return opened if keep_sets is None else opened.masked(KeepSets.read(keep_sets, opened.config))


def as_model(model: Any) -> Model:
    """What a function takes as a model: an open one, or the name of one."""
    if is_path(model):
        return open(model)
    if isinstance(model, Model):
        return model
    raise InputError(f"a model is {type(model).__name__}: give what gptoss_jax.open gives, or a name that it takes")
