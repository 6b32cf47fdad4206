"""Answers whose tokens' choices were recorded: published examples, or a trace. Letters: see `config`."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int32

from gptoss_jax.config import Config
from gptoss_jax.data.harmony import HarmonyText
from gptoss_jax.data.tokens import load_tokenizer, token_ids
from gptoss_jax.errors import DataError, FingerprintError
from gptoss_jax.files.paths import AnyPath, local_folder
from gptoss_jax.fingerprints.published import Example, Published, read_published
from gptoss_jax.network.source import Source
from gptoss_jax.routing.tables import tokenizer_hash
from gptoss_jax.routing.traces import TRACE, Trace


class Answer(NamedTuple):
    """A row of tokens, some of which have choices."""

    name: str
    token_ids: Int32[np.ndarray, " n"]
    first: int
    """The token that the first choices are of."""
    experts_TLk: Int[np.ndarray, "T L k"]
    """Best first."""
    gates_TLk: Float[np.ndarray, "T L k"]


class Recorded(NamedTuple):
    """What is compared, and what was found out about it before."""

    answers: list[Answer]
    remarks: list[str]


def read(place: AnyPath, source: Source) -> Recorded:
    """The answers of a trace's folder, or of published examples; UserError where they are not of a model like this."""
    found = _of_trace(Trace.open(place), source) if (place / TRACE).exists() else _of_published(place, source)
    if not found.answers:
        raise DataError(f"{place}: holds no token with choices that could be compared")
    for answer in found.answers:
        if len(answer.token_ids) > source.config.max_position:
            raise DataError(
                f"{place}: {answer.name} has {len(answer.token_ids)} tokens, and the model's context is "
                f"{source.config.max_position}: give the model that it was recorded with"
            )
    return found


def _of_trace(trace: Trace, source: Source) -> Recorded:
    config, about = source.config, trace.about
    _check_sizes(str(trace.folder), config, about.num_layers, about.top_k, about.num_experts)
    answers, remarks = [], []
    if about.model_fingerprint != source.fingerprint():
        remarks.append("The trace is of another checkpoint of these sizes, by its fingerprint.")
    if about.tokenizer_hash != tokenizer_hash(source.folder):
        remarks.append("The trace was made with another tokenizer.json; its token ids are taken as they are.")
    for prompt in trace:
        where = f"{trace.folder}: prompt {prompt.prompt_id}"
        if not np.array_equal(prompt.positions, np.arange(len(prompt))):
            raise DataError(f"{where} attends to tokens before it: trace without --cross-document")
        if prompt.token_ids.max() >= config.vocab_size:
            raise DataError(f"{where} has token {prompt.token_ids.max()}, the vocab_size is {config.vocab_size}")
        if len(prompt.experts):
            answers.append(Answer(prompt.prompt_id, prompt.token_ids, 0, prompt.experts, prompt.gates))
    return Recorded(answers, remarks)


def _of_published(place: AnyPath, source: Source) -> Recorded:
    published = Published()
    read_published(place, published)
    with local_folder(source.folder) as folder:
        tokenizer = load_tokenizer(folder)
    answers, whole, left_out, tokens = [], 0, 0, 0
    for name, example in _examples(published):
        _, L, k = example.experts_TLk.shape
        _check_sizes(f"{place}: {name}", source.config, L, k, int(example.experts_TLk.max()) + 1, at_least=True)
        answer = _forced(name, example, tokenizer, source.config)
        tokens += len(example.experts_TLk)
        left_out += len(example.experts_TLk) - len(answer.experts_TLk)
        whole += len(answer.experts_TLk) == len(example.experts_TLk)
        if len(answer.experts_TLk):
            answers.append(answer)
    if not tokens:
        raise FingerprintError(f"{place}: holds no examples, and summaries have no tokens: give files …_examples.json")
    remark = f"The tokenizer gives the recorded tokens of {whole} of {len([*_examples(published)])} answers"
    more = f"; {left_out:,} of {tokens:,} recorded tokens, from the first that it cuts otherwise, are left out"
    return Recorded(answers, [remark + (more if left_out else "") + "."])


def _examples(published: Published) -> Iterator[tuple[str, Example]]:
    for group, examples in sorted(published.examples.items()):
        for example in examples:
            yield f"{group.benchmark}/{group.category}, row {example.row_index}", example


def _forced(name: str, example: Example, tokenizer: Any, config: Config) -> Answer:
    """The example by the model's tokens, up to the first one that the recorded text has cut otherwise: what follows
    would see other tokens than it saw when it was recorded."""
    texts = [*example.before, *example.reply]
    ids = token_ids(HarmonyText("".join(texts)), tokenizer, config.vocab_size)
    same = 0
    for number, text in zip(ids.tolist(), texts, strict=False):
        if tokenizer.decode([number]) != text:
            break
        same += 1
    routed = max(0, min(len(example.experts_TLk), same - len(example.before)))
    first = len(example.before)
    return Answer(name, ids[: first + routed], first, example.experts_TLk[:routed], example.gates_TLk[:routed])


def _check_sizes(where: str, config: Config, layers: int, top_k: int, experts: int, at_least: bool = False) -> None:
    """DataError where the choices are not of a model of these sizes; `at_least`: of experts only those are known that
    were chosen."""
    wanted = "give the model that it was recorded with"
    if layers != config.num_layers or top_k != config.top_k:
        raise DataError(
            f"{where}: is of {layers} layers and {top_k} experts a token, the model has {config.num_layers} and "
            f"{config.top_k}: {wanted}"
        )
    if experts > config.num_experts or (experts < config.num_experts and not at_least):
        raise DataError(f"{where}: is of {experts} experts, the model has {config.num_experts}: {wanted}")
