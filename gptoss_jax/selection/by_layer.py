"""Experts by layer with their origin, and the file that holds both. Letters: see `config`.

`Ranking` and `KeepSets` are such lists; what is the same for both stands here.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from ..config import Config
from ..errors import RankingError, reason, refusal
from ..files.atomic import write_file
from ..files.paths import AnyPath, place, storage_errors
from .origin import UNKNOWN, Origin, rows_of_text

Kind = TypeVar("Kind", bound="ByLayer")

VERSION = 1
KINDS = {
    "ranking": "a ranking: give it with --ranking and --keep",
    "keep_sets": "keep-sets: give them with --keep-sets",
}


@dataclass(frozen=True)
class ByLayer:
    """A list of experts for each layer.

    Args:
        layers: L lists of experts' ids.
        origin: Where they come from.
        counts: Beside each expert how many tokens chose it; None where that is unknown.
        reasons: Beside each expert why it stands there, in a few words; None where that is unknown.
        losses: Beside each expert what its layer loses once it and all that are worse are gone, None of the best one;
            None where nobody has looked.
    """

    layers: list[list[int]]
    origin: Origin = UNKNOWN
    counts: list[list[int]] | None = None
    reasons: list[list[str | None]] | None = None
    losses: list[list[float | None]] | None = None

    kind: ClassVar[str]
    written_by: ClassVar[str]
    """The command whose files these are."""

    def check(self, config: Config, where: str) -> None:
        """RankingError, which begins with `where`, if the lists do not fit the model."""
        check_experts(self.layers, config, where)

    def to_json(self) -> str:
        """The content of the file, one line: equal objects give equal bytes."""
        domains = self.origin.domains
        origin = vars(self.origin) | {"domains": None if domains is None else dict(sorted(domains.items()))}
        for name in ("calibration_rows", "answers_hash"):  # older programs know neither
            if origin[name] is None:
                del origin[name]
        head = {"kind": self.kind, "version": VERSION, "layers": self.layers}
        beside: dict[str, Any] = {"counts": self.counts, "reasons": self.reasons}
        if self.losses is not None:  # which older programs do not know either
            beside["losses"] = self.losses
        return json.dumps({**head, **origin, **beside, **self.more()}) + "\n"

    def more(self) -> dict[str, Any]:
        """What the file has beside these, which a kind of its own knows."""
        return {}

    @classmethod
    def with_more(cls: type[Kind], found: Kind, said: dict[str, Any], where: str) -> Kind:
        """The lists with what `more` gave."""
        return found

    def write(self, file: str | AnyPath, overwrite: bool = False) -> None:
        """Write the file, whole or not at all; OutputError where it exists or cannot be written."""
        write_file(place(file), self.to_json(), overwrite)

    @classmethod
    def read(cls: type[Kind], file: str | AnyPath, config: Config) -> Kind:
        """The file's content, checked against the model; RankingError where it cannot be used."""
        path = place(file)
        try:
            with storage_errors(path):
                data = path.read_bytes()
        except FileNotFoundError:
            raise RankingError(f"{path}: no such file: `gptoss-jax {cls.written_by}` writes one") from None
        except OSError as error:
            raise RankingError(f"{path}: not a JSON file ({refusal(error)})") from None
        return cls.parse(data, config, str(path))

    @classmethod
    def parse(cls: type[Kind], data: bytes, config: Config, where: str) -> Kind:
        """Reads what `read` does, from the bytes of a file that errors call `where`.

        Lists without origin are read too: L lists, {"layer_0": list, …}, or one of these as {"keep": …}.
        """
        try:
            raw = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise RankingError(f"{where}: not a JSON file ({reason(error)})") from None
        said = raw if isinstance(raw, dict) and "kind" in raw else {}
        if said:
            _check_kind(said, cls.kind, where)
        layers = _lists(said.get("layers") if said else raw, where)
        check_experts(layers, config, where)
        counts = _beside(said, "counts", layers, _is_count, "a number of tokens", where)
        reasons = _beside(said, "reasons", layers, _is_reason, "a text or null", where)
        losses = _beside(said, "losses", layers, _is_loss, "a number of at least 0 or null", where)
        found = cls(layers, _origin(said, where), counts, reasons, losses)
        found.check(config, where)
        return cls.with_more(found, said, where)


def check_experts(layers: Sequence[Sequence[Any]], config: Config, where: str) -> None:
    """RankingError where the number of layers is not the model's, or a layer names an expert twice or one too many."""
    last = config.num_experts - 1
    if len(layers) != config.num_layers:
        raise RankingError(f"{where}: has {len(layers)} layers, the model has {config.num_layers}")
    for layer, experts in enumerate(layers):
        for expert in experts:
            if not _is_whole(expert) or not 0 <= expert <= last:
                raise RankingError(f"{where}: layer {layer} names expert {expert!r}, the model has experts 0 to {last}")
        if len(set(experts)) < len(experts):
            twice = next(expert for expert in experts if list(experts).count(expert) > 1)
            raise RankingError(f"{where}: layer {layer} names expert {twice} twice")


def _check_kind(said: dict[str, Any], kind: str, where: str) -> None:
    if said["kind"] != kind:
        if said["kind"] in [*KINDS]:  # in a list, where what cannot be hashed may be looked for
            raise RankingError(f"{where}: holds {KINDS[said['kind']]}")
        raise RankingError(f"{where}: is of the unknown kind {said['kind']!r}: there are {', '.join(KINDS)}")
    if not _is_whole(said.get("version")) or said["version"] != VERSION:
        raise RankingError(
            f"{where}: is of version {said.get('version')!r}, this program reads version {VERSION}: "
            "take the gptoss-jax that wrote it"
        )


def _lists(raw: Any, where: str) -> list[list[Any]]:
    if isinstance(raw, dict) and "keep" in raw:
        raw = raw["keep"]
    if isinstance(raw, dict):
        names = [f"layer_{i}" for i in range(len(raw))]
        if set(names) != set(raw):
            raise RankingError(f"{where}: expected the keys layer_0 … layer_{len(raw) - 1}, found {', '.join(raw)}")
        raw = [raw[name] for name in names]
    if not isinstance(raw, list) or not all(isinstance(experts, list) for experts in raw):
        raise RankingError(f'{where}: expected a list for each layer, or {{"layer_0": [...], ...}}')
    return raw


def _origin(said: dict[str, Any], where: str) -> Origin:
    found = {name: said[name] for name in ORIGIN if said.get(name) is not None}
    for name, value in found.items():
        what, fits = ORIGIN[name]
        if not fits(value):
            raise RankingError(f"{where}: its {name!r} is not {what}: mend it or leave it out")
    if "domains" in found:
        found["domains"] = {name: float(weight) for name, weight in found["domains"].items()}
    return Origin(**found)


def _beside(
    said: dict[str, Any], name: str, layers: list[list[int]], fits: Callable[[Any], bool], what: str, where: str
) -> Any:
    """A list beside each layer's, an entry for each expert."""
    lists = said.get(name)
    if lists is None:
        return None
    shaped = isinstance(lists, list) and all(isinstance(one, list) for one in lists)
    if not shaped or [len(one) for one in lists] != [len(experts) for experts in layers]:
        raise RankingError(f"{where}: its {name!r} has not one entry for each expert of each layer: leave it out")
    if not all(fits(value) for one in lists for value in one):
        raise RankingError(f"{where}: its {name!r} holds what is not {what}: mend it or leave it out")
    return lists


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return _is_whole(value) and value >= 0


def _is_loss(value: Any) -> bool:
    return value is None or _is_weight(value)


def _is_reason(value: Any) -> bool:
    return value is None or _is_text(value)


def _are_weights(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_weight(weight) for weight in value.values())


def _is_weight(value: Any) -> bool:
    return (isinstance(value, float) or _is_whole(value)) and 0 <= value <= sys.float_info.max


def _are_rows(value: Any) -> bool:
    try:
        return _is_text(value) and rows_of_text(value) is not None
    except ValueError:
        return False


# What each field of an origin holds where it is not null.
ORIGIN: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "criterion": ("a text", _is_text),
    "domains": ("an object of domains and their weights", _are_weights),
    "rule": ("a text", _is_text),
    "seed": ("a whole number", _is_whole),
    "profile_hash": ("a text", _is_text),
    "model_fingerprint": ("a text", _is_text),
    "answers_hash": ("a text", _is_text),
    "calibration_rows": ("a list of sorted hashes in base64", _are_rows),
}
