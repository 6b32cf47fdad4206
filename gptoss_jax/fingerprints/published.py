"""The files of published fingerprints: summaries of groups, and examples with the routing of each token.

They lie in `{benchmark}/{category}/{finished}_{repetition}.json` and `…_examples.json`, in a folder or a tar archive,
below any other folders. Whatever else lies there is left alone. Letters: see `config`; T are routed tokens.
"""

import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..errors import FingerprintError, reason, refusal, shown
from ..files.paths import AnyPath, storage_errors
from .summaries import SEGMENTS, Group

NAME = re.compile(r"(True|False)_(True|False)(_examples)?\.json")
LAYOUT = "BENCHMARK/CATEGORY/True_False.json or True_False_examples.json"
MOST_EXPERTS = 1024  # eight times those of gpt-oss-120b: an id above is none, and would take any amount of memory
ROUNDING = 1e-2  # of means of gates in bfloat16, which may add up to a little more than 1
Cell = tuple[int, int, float, float]
"""Layer, expert, count frequency and probability density."""


class Means(NamedTuple):
    """What a summary file says of one segment."""

    sample_count: int
    tokens: float
    num_layers: int
    cells: list[Cell]
    """Of the experts that were seen."""


@dataclass(frozen=True)
class Example:
    """An answer with the routing of its tokens."""

    row_index: int
    prompt: str
    before: list[str]
    """The tokens in front of the reply, as texts: the prompt as the model saw it."""
    reply: list[str]
    """Its tokens, as texts."""
    experts_TLk: np.ndarray
    """Those that token t of the reply chose, best first; the last token has none."""
    gates_TLk: np.ndarray


@dataclass
class Published:
    """All that was read, by group."""

    summaries: dict[Group, dict[str, Means]] = field(default_factory=dict)
    examples: dict[Group, list[Example]] = field(default_factory=dict)


def read_published(source: AnyPath, into: Published) -> None:
    """Add what a folder or an archive holds. FingerprintError names the file and the place in it that is wrong."""
    before = len(into.summaries) + len(into.examples)
    with storage_errors(source):
        for group, is_example, data, where in _files(source):
            known = into.examples if is_example else into.summaries
            if group in known:
                raise FingerprintError(f"{where}: its group was read already: give each file once")
            raw = _object(_parsed(data, where), where)
            if is_example:
                into.examples[group] = [_example(raw, group, where)]
            else:
                into.summaries[group] = _summary(raw, where)
    if before == len(into.summaries) + len(into.examples):
        raise FingerprintError(f"{source}: holds no published fingerprints: expected files {LAYOUT}")


def _files(source: AnyPath) -> Iterator[tuple[Group, bool, bytes, str]]:
    """Each file's group, whether it is an example, its bytes, and what errors call it."""
    try:
        if source.is_dir():
            files: list[AnyPath] = sorted(source.rglob("*.json"), key=str)
            for file in files:
                if named := _named(file.parts):
                    yield *named, file.read_bytes(), str(file)
        else:
            with source.open("rb") as stream, tarfile.open(fileobj=stream) as archive:
                for member in archive:
                    opened = archive.extractfile(member) if member.isfile() else None
                    if opened is not None and (named := _named(member.name.split("/"))):
                        yield *named, opened.read(), f"{source}, {member.name}"
    except FileNotFoundError:
        raise FingerprintError(f"{source}: no such file or folder: give published fingerprints") from None
    except OSError as error:
        raise FingerprintError(f"{source}: cannot be read ({refusal(error)})") from None
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise FingerprintError(f"{source}: not a folder, nor a whole tar archive ({reason(error)})") from None


def _named(parts: Sequence[str]) -> tuple[Group, bool] | None:
    """The group of a file of such a path, and whether it is an example."""
    match = NAME.fullmatch(parts[-1]) if len(parts) > 2 else None
    return match and (Group(parts[-3], parts[-2], match[1] == "True", match[2] == "True"), bool(match[3]))


def _summary(raw: dict[str, Any], where: str) -> dict[str, Means]:
    count = _whole(raw, "sample_count", where, least=1)
    found = {}
    for segment in SEGMENTS:
        name = f"{segment}_expert_analytics"
        if name in raw:
            tokens = _number(raw, f"num_{segment}_tokens", where, most=2.0**53)
            layers = _layers(_object(raw[name], f"{where}: {name}"), f"{where}: {name}")
            found[segment] = Means(count, tokens, len(layers), [*_cells(layers, f"{where}: {name}")])
    if not found:
        raise FingerprintError(f"{where}: has neither think_expert_analytics nor answer_expert_analytics")
    return found


def _cells(layers: list[Any], where: str) -> Iterator[Cell]:
    for layer, experts in enumerate(layers):
        place = f"{where}, layer_{layer}"
        for expert, figures in _object(experts, place).items():
            here = f"{place}, expert {shown(expert)}"
            if not re.fullmatch(r"0|[1-9]\d{0,3}", expert) or int(expert) >= MOST_EXPERTS:
                raise FingerprintError(f"{here}: no id of an expert: expected a number below {MOST_EXPERTS:,}")
            figures = _object(figures, here)
            shares = (_number(figures, name, here, 1 + ROUNDING) for name in ("count_frequency", "prob_density"))
            yield layer, int(expert), *shares  # type: ignore[misc]


def _example(raw: dict[str, Any], group: Group, where: str) -> Example:
    said = [raw.get(name) for name in ("dataset", "category", "finished_successfully", "has_repetition")]
    if said != [*group]:
        raise FingerprintError(f"{where}: says that it is of {shown(said)}, its path says {shown([*group])}")
    prompt = raw.get("original_prompt")
    if not isinstance(prompt, str):
        raise FingerprintError(f"{where}: its 'original_prompt' is {shown(prompt)}: expected a text")
    whole, reply = (_texts(raw, name, where) for name in ("full_text", "generated_only"))
    if not reply or whole[-len(reply) :] != reply:
        raise FingerprintError(f"{where}: 'full_text' does not end with 'generated_only'")
    entries, first = raw.get("router_data"), len(whole) - len(reply)
    if not isinstance(entries, list) or len(entries) != len(reply) - 1 or not entries:
        raise FingerprintError(f"{where}: 'router_data' has not one entry for each generated token but the last")
    routing = [_routing(entry, f"token_{first + t}", f"{where}: router_data") for t, entry in enumerate(entries)]
    L, k = len(routing[0]), len(routing[0][0][0])
    for t, layers in enumerate(routing):
        if len(layers) != L or any(len(experts) != k for experts, _ in layers):
            raise FingerprintError(f"{where}: router_data, token_{first + t}: expected {L} layers of {k} experts")
    experts_TLk = np.array([[experts for experts, _ in layers] for layers in routing])
    gates_TLk = np.array([[gates for _, gates in layers] for layers in routing], np.float64)
    return Example(_whole(raw, "row_index", where), prompt, whole[:first], reply, experts_TLk, gates_TLk)


def _routing(entry: Any, label: str, where: str) -> list[tuple[list[int], list[float]]]:
    """Of each layer the chosen experts and their gates."""
    if [*_object(entry, where)] != [label]:
        raise FingerprintError(f"{where}: an entry is labelled {shown([*entry])}: expected {label!r}")
    where, found = f"{where}, {label}", []
    for layer, chosen in enumerate(_layers(_object(entry[label], where), where)):
        here = f"{where}, layer_{layer}"
        experts, gates = (_object(chosen, here).get(name) for name in ("selected_experts", "selected_probs"))
        if not isinstance(experts, list) or not experts or not all(_is_expert(expert) for expert in experts):
            raise FingerprintError(f"{here}: 'selected_experts' is {shown(experts)}: expected ids of experts")
        if len({*experts}) < len(experts):
            raise FingerprintError(f"{here}: 'selected_experts' is {shown(experts)}: names one twice")
        if not isinstance(gates, list) or len(gates) != len(experts) or not all(_is_share(gate) for gate in gates):
            raise FingerprintError(f"{here}: 'selected_probs' is {shown(gates)}: expected a gate for each expert")
        found.append((experts, gates))
    return found


def _is_expert(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST_EXPERTS


def _is_share(value: Any, most: float = 1 + ROUNDING) -> bool:
    return type(value) in (int, float) and 0 <= value <= most  # no comparison with NaN holds


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FingerprintError(f"{where}: not valid JSON ({reason(error)}): download the file again") from None


def _object(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise FingerprintError(f"{where}: is {shown(raw)}: expected an object")
    return raw


def _layers(raw: dict[str, Any], where: str) -> list[Any]:
    names = [f"layer_{layer}" for layer in range(len(raw))]
    if not raw or {*names} != {*raw}:
        raise FingerprintError(f"{where}: has the keys {shown([*raw])}: expected layer_0 and those that follow")
    return [raw[name] for name in names]


def _number(raw: dict[str, Any], name: str, where: str, most: float) -> float:
    if not _is_share(raw.get(name), most):
        raise FingerprintError(f"{where}: {name!r} is {shown(raw.get(name))}: expected a number of 0 to {most:g}")
    return float(raw[name])


def _whole(raw: dict[str, Any], name: str, where: str, least: int = 0) -> int:
    value = raw.get(name)
    if type(value) is not int or not least <= value < 1 << 53:
        raise FingerprintError(f"{where}: {name!r} is {shown(value)}: expected a whole number of at least {least}")
    return value


def _texts(raw: dict[str, Any], name: str, where: str) -> list[str]:
    value = raw.get(name)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise FingerprintError(f"{where}: {name!r} is {shown(value)}: expected a list of tokens' texts")
    return value
