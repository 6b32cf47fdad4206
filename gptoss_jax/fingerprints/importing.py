"""From published files to an activation dataset. Letters: see `config`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import FingerprintError
from .folder import Activations
from .published import Example, Means, Published
from .summaries import Group, Summary, sample_count
from .traces import contents, published_segments, segment_sums

Sums = tuple[int, np.ndarray, np.ndarray]
"""Of a segment of one answer: its tokens, counts [L, E], sums of gates [L, E]."""


def activations(published: Published, source: str, domains: Mapping[str, Sequence[str]] | None) -> Activations:
    """What was published as a dataset.

    A group with a summary has the figures of that, and one without those of its examples. Where all answers of a group
    are there as examples, and give the summary to the bit, it also has their counts. FingerprintError where files are
    of models of different sizes.
    """
    L, E, k = _sizes(published)
    summaries: list[Summary] = []
    whole = reproduced = 0
    for group in sorted({*published.summaries, *published.examples}):
        said = {name: _of_means(group, name, means, L, E) for name, means in published.summaries.get(group, {}).items()}
        seen = of_examples(group, published.examples.get(group, []), E)
        is_whole = bool(said) and all(
            len(published.examples.get(group, [])) == one.sample_count for one in said.values()
        )
        is_same = is_whole and _are_same(said, seen)
        whole, reproduced = whole + is_whole, reproduced + is_same
        summaries += (said if said and not is_same else seen).values()
    if not summaries:
        raise FingerprintError(f"{source}: none of its {len(published.examples)} examples has thoughts or an answer")
    answers = [_answer(group, example) for group, some in sorted(published.examples.items()) for example in some]
    info = {
        "source": source,
        "model": None,
        "model_fingerprint": None,
        "num_layers": L,
        "num_experts": E,
        "top_k": k,
        "counted": "messages",
        "groups": len({one.group for one in summaries}),
        "samples": sample_count(summaries),
        "answers": len(answers),
        "whole_groups": whole,
        "reproduced_groups": reproduced,
        "domains": None if domains is None else {name: [*some] for name, some in domains.items()},
    }
    return Activations.of(summaries, answers, info)


def _sizes(published: Published) -> tuple[int, int, int]:
    """Layers; one expert more than the highest id; experts of a token, which no layer's frequencies exceed in sum."""
    layers: dict[int, Group] = {}
    highest, most = 0, 0.0
    for group, segments in published.summaries.items():
        for means in segments.values():
            layers.setdefault(means.num_layers, group)
            sums = np.zeros(means.num_layers)
            for layer, expert, frequency, _ in means.cells:
                highest, sums[layer] = max(highest, expert), sums[layer] + frequency
            most = max(most, sums.max())
    for group, examples in published.examples.items():
        for example in examples:
            _, L, k = example.experts_TLk.shape
            layers.setdefault(L, group)
            highest, most = max(highest, int(example.experts_TLk.max())), max(most, k)
    if len(layers) > 1:
        few, many = min(layers), max(layers)
        where = f"{few} layers in {_path(layers[few])}, {many} in {_path(layers[many])}"
        raise FingerprintError(f"files are of different models: {where}: import them apart")
    return next(iter(layers)), highest + 1, int(np.ceil(most - 1e-6))


def _path(group: Group) -> str:
    return f"{group.name}/{group.finished}_{group.repetition}"


def _of_means(group: Group, segment: str, means: Means, num_layers: int, num_experts: int) -> Summary:
    frequency_LE, density_LE = np.zeros((2, num_layers, num_experts))
    for layer, expert, frequency, density in means.cells:
        frequency_LE[layer, expert], density_LE[layer, expert] = frequency, density
    return Summary(group, segment, means.sample_count, means.tokens, frequency_LE, density_LE)


def of_examples(group: Group, examples: Sequence[Example], num_experts: int) -> dict[str, Summary]:
    """The summaries of a group, by segment, from the routing of its answers."""
    of_segment: dict[str, list[Sums]] = {}
    for example in examples:
        for name, segment in published_segments(example.reply, group.finished).items():
            sums = segment_sums(example.experts_TLk, example.gates_TLk, segment, num_experts)
            of_segment.setdefault(name, []).append((segment.tokens, *sums))
    return {name: _summed(group, name, of_segment[name]) for name in sorted(of_segment, reverse=True)}


def _summed(group: Group, segment: str, answers: Sequence[Sums]) -> Summary:
    tokens, counts, gates = zip(*answers, strict=True)
    frequency_LE, density_LE = (
        np.mean([sums / size for size, sums in zip(tokens, some, strict=True)], axis=0) for some in (counts, gates)
    )
    return Summary(
        group,
        segment,
        len(answers),
        float(np.mean(tokens)),
        frequency_LE,
        density_LE,
        np.sum(counts, 0),
        np.sum(gates, 0),
    )


def _are_same(said: Mapping[str, Summary], seen: Mapping[str, Summary]) -> bool:
    """Whether examples give the figures of the summary file, to the bit."""
    return said.keys() == seen.keys() and all(
        said[name].tokens == seen[name].tokens
        and np.array_equal(said[name].count_frequency_LE, seen[name].count_frequency_LE)
        and np.array_equal(said[name].prob_density_LE, seen[name].prob_density_LE)
        for name in said
    )


def _answer(group: Group, example: Example) -> dict[str, Any]:
    """A row of answers.parquet."""
    texts, segments = contents(example.reply), published_segments(example.reply, group.finished)
    sizes = {f"{name}_tokens": segments[name].tokens if name in segments else 0 for name in texts}
    return {
        "prompt_id": str(example.row_index),
        "benchmark": group.benchmark,
        "category": group.category,
        "prompt": example.prompt,
        "reply": "".join(example.reply),
        **texts,
        **sizes,
        "finished": group.finished,
        "repetition": group.repetition,
    }
