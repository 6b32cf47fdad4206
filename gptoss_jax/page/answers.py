"""What a page has of prompts and replies: their tokens with the experts that each chose, and what models replied."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

from ..errors import EvaluationError, TraceError, reason, refusal
from ..evaluation.outputs import REPLIES
from ..files.paths import AnyPath, storage_errors
from ..routing.segments import SEGMENTS
from ..routing.tables import Routed
from ..routing.traces import Trace
from .packing import Packed

# Bytes of the page's text for the experts and gates of all traces together: with what else a page of gpt-oss-20b holds
# it stays below 3 MB.
ROUTED_BYTES = 1_600_000
BEST_PACKED = 4  # times smaller than they are that experts and gates become at most: more tokens need not be looked at
PROMPTS_SHOWN = 50  # of a trace
GATE_STEPS = 255  # a gate is shown in steps of 1/255
REPLIES_SHOWN = 50  # questions of an evaluation


def traces_of(traces: Mapping[str, Trace], tokenizer: Any, packed: Packed) -> dict[str, Any]:
    """The tokens of every trace, as many of each prompt as fit, and the texts of all tokens that are there.

    A token's place in `pieces` is what the arrays hold. `tokens` says of each prompt how many it has, `shown` how many
    of these the page has, and `routed` of how many of them the experts are known; `prompts` how many the trace has.
    """
    found = [(name, trace, *_cut(trace, ROUTED_BYTES // len(traces))) for name, trace in traces.items()]
    ids = np.unique(np.concatenate([np.zeros(0, np.int32), *(p.token_ids for *_, some in found for p in some)]))
    return {
        "segments": [*SEGMENTS],
        "pieces": [tokenizer.decode([int(token)]) for token in ids],
        "traces": [_trace_of(name, trace, lengths, some, ids, packed) for name, trace, lengths, some in found],
    }


def _cut(trace: Trace, room: int) -> tuple[list[int], list[Routed]]:
    """The lengths of the prompts that are shown, and what is shown of each: what is cut off stands at the end."""
    if not (whole := [*islice(trace, PROMPTS_SHOWN)]):
        raise TraceError(f"{trace.folder}: holds no prompt: trace rows that have tokens")
    lengths = [*map(len, whole)]
    each = min(max(lengths), max(1, BEST_PACKED * room // (2 * trace.about.width * len(whole))))
    while True:
        some = [_first(prompt, each) for prompt in whole]
        packed = Packed()
        _routed(some, trace, packed)
        if each == 1 or (size := len(packed.text())) <= room:
            return lengths, some
        each = max(1, min(each - 1, each * room // size))


def _first(prompt: Routed, tokens: int) -> Routed:
    arrays = (prompt.token_ids, prompt.positions, prompt.segments, prompt.generated, prompt.experts, prompt.gates)
    return Routed(prompt.prompt_id, *(array[:tokens] for array in arrays))


def _routed(some: list[Routed], trace: Trace, packed: Packed) -> dict[str, Any]:
    """Experts and gates of all tokens, one prompt behind the other; gates in steps."""
    gates = np.concatenate([prompt.gates.astype(np.float32) for prompt in some])
    experts = np.concatenate([prompt.experts for prompt in some])
    return {
        "experts": packed.add_experts(experts, trace.about.num_experts),
        "gates": packed.add(np.round(gates * GATE_STEPS), "u1"),
    }


def _trace_of(
    name: str, trace: Trace, lengths: list[int], some: list[Routed], ids: np.ndarray, packed: Packed
) -> dict[str, Any]:
    def joined(arrays: Iterator[np.ndarray]) -> np.ndarray:
        return np.concatenate([*arrays])

    return {
        "name": name,
        "prompts": len(trace),
        "ids": [prompt.prompt_id for prompt in some],
        "tokens": lengths,
        "shown": [*map(len, some)],
        "routed": [len(prompt.experts) for prompt in some],
        "pieces": packed.add(np.searchsorted(ids, joined(prompt.token_ids for prompt in some)), "u4"),
        "of_segment": packed.add(joined(prompt.segments for prompt in some), "u1"),
        "generated": packed.add(joined(prompt.generated for prompt in some), "u1"),
        **_routed(some, trace, packed),
    }


def check_tokenizer(traces: Mapping[str, Trace], found: str, model: str) -> None:
    """TraceError where a trace is of another tokenizer than the model's, whose hash was found."""
    for name, trace in traces.items():
        if trace.about.tokenizer_hash != found:
            raise TraceError(f"{name}: its tokens are not of the tokenizer of {model}: name the model that was traced")


def replies_of(folder: AnyPath | None) -> list[dict[str, Any]]:
    """What each model replied to the first questions of an evaluation: objects with the question's `id`, and `said`, by
    model, the baseline under the empty name. Empty where nothing was asked. Questions with the same id say their rows
    too."""
    if folder is None:
        return []
    file = folder / REPLIES
    try:
        with storage_errors(file):
            lines = file.read_bytes().splitlines()  # of a text it would cut at more than ends of lines
    except FileNotFoundError:
        return []
    except OSError as error:
        raise EvaluationError(f"{file}: cannot be read ({refusal(error)})") from None
    ids: dict[int, str] = {}
    said: dict[int, dict[str, str]] = {}
    for number, line in enumerate(lines, 1):
        try:
            reply = json.loads(line.decode("utf-8"))
            row = int(reply["row"])
            ids[row] = str(reply["id"] or row)
            said.setdefault(row, {})[str(reply["model"] or "")] = str(reply["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"{file}: line {number} is no reply ({reason(error)}): evaluate again") from None
    times = Counter(ids.values())
    names = {row: f"{id} (row {row})" if times[id] > 1 else id for row, id in ids.items()}
    return [{"id": names[row], "said": said[row]} for row in sorted(said)][:REPLIES_SHOWN]
