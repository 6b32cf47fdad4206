"""Checkpoints that are damaged, hostile or of another model are refused, and nothing is written."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import checkpoints, tokenizers
from gptoss_jax.config import TINY

from .bad_input import (
    INDEX,
    SHORT,
    Refused,
    case,
    dump,
    edit,
    edit_entry,
    poke,
    read_shard,
    write_shard,
)

SHARD, LAST = "model-00002-of-00005.safetensors", "model-00005-of-00005.safetensors"
NORM, ROUTER = "model.norm.weight", "model.layers.2.mlp.router.weight"
DEEP = b"[" * 200_000
Damage = Callable[[Path], Any]


def cut(at: int) -> Damage:
    return lambda m: (m / SHARD).write_bytes((m / SHARD).read_bytes()[:at])


def append(tail: bytes) -> Damage:
    return lambda m: (m / SHARD).write_bytes((m / SHARD).read_bytes() + tail)


def index(content: Any) -> Damage:
    return lambda m: (m / INDEX).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def weight_map(**shards: Any) -> Damage:
    """Change the index; ... removes a tensor from it."""

    def damage(m: Path) -> None:
        raw = json.loads((m / INDEX).read_text())
        names = raw["weight_map"] | shards
        dump(m / INDEX, raw | {"weight_map": {k: v for k, v in names.items() if v is not ...}})

    return damage


def header(content: Any) -> Damage:
    return lambda m: write_shard(m / SHARD, content, read_shard(m / SHARD)[1])


def length(value: int) -> Damage:
    return lambda m: (m / SHARD).write_bytes(value.to_bytes(8, "little") + (m / SHARD).read_bytes()[8:])


def entry(name: str, **changes: Any) -> Damage:
    return lambda m: edit_entry(m, name, **changes)


def shifted(m: Path) -> None:
    """All tensors of a shard 8 bytes later, so that a hole lies before the first."""
    tensors, data = read_shard(m / SHARD)
    for value in tensors.values():
        if "data_offsets" in value:
            value["data_offsets"] = [n + 8 for n in value["data_offsets"]]
    write_shard(m / SHARD, tensors, bytes(8) + data)


def twice(m: Path) -> None:
    """A second, different copy of a tensor in another shard than the index says."""
    tensors, data = read_shard(m / SHARD)
    tensors[NORM] = {"dtype": "BF16", "shape": [64], "data_offsets": [len(data), len(data) + 128]}
    write_shard(m / SHARD, tensors, data + bytes(128))


def folder_instead(name: str) -> Damage:
    def damage(m: Path) -> None:
        (m / name).unlink()
        (m / name).mkdir()

    return damage


def only(*names: str) -> Damage:
    return lambda m: [p.unlink() for p in m.iterdir() if p.name not in names]


def no_index_one_file(m: Path) -> None:
    """A checkpoint of one file, and that truncated."""
    only("config.json", SHARD)(m)
    (m / SHARD).rename(m / "model.safetensors")


WEIGHTS = [
    case("missing shard", lambda m: (m / SHARD).unlink(), SHARD, "missing", "download"),
    *[case(f"cut at {n}", cut(n), SHARD, "truncated", "download") for n in (0, 4, 8, 100, 60_000, -1)],
    *[case(f"{n} bytes appended", append(bytes(n)), SHARD, "bytes behind", "download") for n in (1, 4096)],
    case(
        "extra shard", lambda m: shutil.copy(m / SHARD, m / "model-00006-of-00006.safetensors"), "00006-of-00006", INDEX
    ),
    case("index names what no shard holds", weight_map(**{"model.extra": SHARD}), SHARD, "model.extra"),
    case("index names the wrong shard", weight_map(**{NORM: SHARD}), SHARD, NORM),
    case("index names a later shard", weight_map(**{ROUTER: LAST}), LAST, ROUTER),
    case("shard holds what the index lacks", weight_map(**{NORM: ...}), "00005-of-00005", NORM),
    case("index is no JSON", index(b"{"), INDEX, "download"),
    case("index is no UTF-8", index(b'{"\xff": 1}'), INDEX, "download"),
    case("index is a list", index([]), INDEX, "download"),
    case("index is empty", index({}), INDEX, "weight_map"),
    case("weight map is a list", index({"weight_map": [SHARD]}), INDEX, "download"),
    case("weight map is empty", index({"weight_map": {}}), "model-0000", "index"),
    case("shard is a number", weight_map(**{NORM: 5}), INDEX, "plain file name"),
    case("shard in another folder", weight_map(**{NORM: f"../{SHARD}"}), INDEX, "plain file name"),
    case("shard is a path", weight_map(**{NORM: "/etc/hostname"}), INDEX, "plain file name"),
    case("shard is the parent", weight_map(**{NORM: ".."}), "plain file name"),
    case("shard is nothing", weight_map(**{NORM: ""}), "plain file name"),
    case("length 2^63", length(2**63), SHARD, "download"),
    case("length 2^64 - 1", length(2**64 - 1), SHARD, "download"),
    case("length 0", length(0), SHARD, "download"),
    case("header is no JSON", header(b"{" * 100), SHARD, "download"),
    case("header is no UTF-8", header(b"\xff" * 100), SHARD, "download"),
    case("header is a list", header([1]), SHARD, "download"),
    case("header is null", header(b"null"), SHARD, "download"),
    case("header is empty", header({}), SHARD, "download"),
    case("entry is a number", header({NORM: 5}), SHARD, "download"),
    case("entry lacks offsets", header({NORM: {"dtype": "BF16", "shape": [1]}}), SHARD, "data_offsets"),
    case("negative offsets", entry(ROUTER, data_offsets=[-896, 0]), ROUTER, "whole numbers"),
    case("offsets reversed", entry(ROUTER, data_offsets=[896, 0]), ROUTER, "do not fit"),
    case("offsets are no numbers", entry(ROUTER, data_offsets=["0", "896"]), ROUTER, "whole numbers"),
    case("three offsets", entry(ROUTER, data_offsets=[0, 1, 2]), "download"),
    case("offsets behind the end", entry(ROUTER, data_offsets=[10**6, 10**6 + 896]), "download"),
    case("overlap", entry(ROUTER, data_offsets=[0, 896]), ROUTER, "overlap"),
    case("negative shape", entry(ROUTER, shape=[-7, -64]), ROUTER, "whole numbers"),
    case("huge shape", entry(ROUTER, shape=[2**62, 2**62]), ROUTER, "do not fit"),
    case("shape is text", entry(ROUTER, shape="7"), ROUTER, "whole numbers"),
    case("dtype of another size", entry(ROUTER, dtype="F32"), ROUTER, "896 bytes do not fit F32 [7, 64]"),
    case("shape of another size", entry(ROUTER, shape=[7, 65]), ROUTER, "896 bytes do not fit BF16 [7, 65]"),
    case("dtype is a list", entry(ROUTER, dtype=["BF16"]), "download"),
    case("wrong dtype", entry(ROUTER, dtype="I16"), ROUTER, "I16 [7, 64], expected BF16 [7, 64]"),
    case("unknown dtype", entry(ROUTER, dtype="F8_E4M3"), ROUTER, "F8_E4M3 [7, 64], expected BF16 [7, 64]"),
    case("wrong shape", entry(ROUTER, shape=[64, 7]), ROUTER, "BF16 [64, 7], expected BF16 [7, 64]"),
    case("wrong rank", entry(ROUTER, shape=[448]), ROUTER, "BF16 [448], expected BF16 [7, 64]"),
    case("no weights", only("config.json"), INDEX, "model.safetensors"),
    case("one file of several", no_index_one_file, "is missing"),
    case("hole before the first tensor", shifted, SHARD),
    case("tensor in two shards", twice, NORM),
    case("index nested too deep", index(DEEP), INDEX),
    case("header nested too deep", header(DEEP), SHARD),
    case("index is a folder", folder_instead(INDEX), INDEX),
]


@pytest.mark.parametrize(("damage", "says"), WEIGHTS)
def test_weights(damage: Damage, says: tuple[str, ...], model: Path, ranking: Path, refused: Refused) -> None:
    damage(model)
    refused("prune", model, "--ranking", ranking, "--keep", 4, "--out", "out", says=says)


def test_weights_in_the_way_of_a_profile(model: Path, rows_jsonl: Path, refused: Refused) -> None:
    cut(-1)(model)
    refused("profile", model, "--data", rows_jsonl, "--out", "out", says=(SHARD, "truncated"))


REQUIRED = [
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_local_experts",
    "intermediate_size",
    "vocab_size",
    "sliding_window",
    "rope_scaling",
    "rms_norm_eps",
    "max_position_embeddings",
]
YARN = {"rope_type": "yarn", "factor": 20.0, "original_max_position_embeddings": 900}
KEYS = [
    *[case(f"no {key}", {key: ...}, key) for key in REQUIRED],
    case("no experts per token", {"num_experts_per_tok": ..., "experts_per_token": ...}, "num_experts_per_tok"),
    case("another model", {"model_type": "mixtral"}, "'mixtral'", "'gpt_oss'"),
    case("hidden_size 0", {"hidden_size": 0}, "hidden_size is 0"),
    case("hidden_size is text", {"hidden_size": "64"}, "hidden_size is '64'"),
    case("hidden_size is a fraction", {"hidden_size": 64.0}, "hidden_size is 64.0"),
    case("head_dim is a truth value", {"head_dim": True}, "head_dim is True"),
    case("odd head_dim", {"head_dim": 13}, "head_dim is 13"),
    case("head_dim of other weights", {"head_dim": 16}, "q_proj.weight", "[140, 64]", "[160, 64]"),
    case("window 0", {"sliding_window": 0}, "sliding_window is 0"),
    case("vocab_size is a list", {"vocab_size": [320]}, "vocab_size is [320]"),
    case("vocab_size of another model", {"vocab_size": 321}, "embed_tokens", "[320, 64]", "[321, 64]"),
    case("0 layers", {"num_hidden_layers": 0, "layer_types": []}, "num_hidden_layers"),
    case("layers are text", {"num_hidden_layers": "4"}, "num_hidden_layers"),
    case("heads negative", {"num_attention_heads": -10}, "num_attention_heads"),
    case("0 key heads", {"num_key_value_heads": 0}, "num_key_value_heads"),
    case("0 experts", {"num_local_experts": 0}, "num_local_experts"),
    case("0 experts per token", {"num_experts_per_tok": 0}, "num_experts_per_tok"),
    case("expert size 0", {"intermediate_size": 0}, "intermediate_size"),
    case("context 0", {"max_position_embeddings": 0}, "max_position_embeddings"),
    case("heads that do not share", {"num_key_value_heads": 3}, "num_attention_heads", "num_key_value_heads"),
    case(
        "more experts per token than experts",
        {"num_experts_per_tok": 8, "experts_per_token": 8},
        "num_experts_per_tok 8",
        "7",
    ),
    case("more experts than weights", {"num_local_experts": 8}, "router.weight", "[7, 64]", "[8, 64]"),
    case("fewer layers than weights", {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}, "layers.3."),
    case("more layers than weights", {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}, "layers.4."),
    case("layer_types of other length", {"layer_types": ["full_attention"] * 3}, "layer_types has 3", "expected 4"),
    case("unknown layer type", {"layer_types": ["chunked"] * 4}, "layer_types", "'chunked'", "'full_attention'"),
    case("layer_types is text", {"layer_types": "full"}, "layer_types"),
    case("layer_types is a number", {"layer_types": 4}, "layer_types"),
    case("unknown rope type", {"rope_scaling": YARN | {"rope_type": "llama3"}}, "'llama3'", "'yarn'"),
    case("rope without factor", {"rope_scaling": {"rope_type": "yarn"}}, "factor"),
    case("rope_scaling is text", {"rope_scaling": "yarn"}, "rope_scaling"),
    case("rope_parameters is a list", {"rope_parameters": [1]}, "rope_parameters"),
    case("factor is text", {"rope_scaling": YARN | {"factor": "x"}}, "factor"),
    case("factor 0", {"rope_scaling": YARN | {"factor": 0}}, "factor"),
    case("context of rope 0", {"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "original"),
    case("theta is text", {"rope_theta": "x"}, "rope_theta"),
    case("theta 0", {"rope_theta": 0}, "rope_theta"),
    case("theta is no number", {"rope_theta": float("nan")}, "rope_theta"),
    case("no head_dim, which is 64 then", {"head_dim": ...}, "q_proj.weight", "[140, 64]", "[640, 64]"),
    case("eps is text", {"rms_norm_eps": "x"}, "rms_norm_eps"),
    case("eps negative", {"rms_norm_eps": -1}, "rms_norm_eps"),
    case("limit is null", {"swiglu_limit": None}, "swiglu_limit"),
    case("limit negative", {"swiglu_limit": -7}, "swiglu_limit"),
    case("second name is null", {"experts_per_token": None}, "experts_per_token"),
    case("two numbers of experts per token", {"experts_per_token": 2}, "experts_per_token"),
    case("other activation", {"hidden_act": "relu"}, "hidden_act"),
]


@pytest.mark.parametrize(("changes", "says"), KEYS)
def test_config(changes: dict[str, Any], says: tuple[str, ...], model: Path, ranking: Path, refused: Refused) -> None:
    edit(model / "config.json", **changes)
    refused("prune", model, "--ranking", ranking, "--keep", 4, "--out", "out", says=says)


def content(name: str, data: bytes) -> Damage:
    return lambda m: (m / name).write_bytes(data)


FOLDERS = [
    case("no folder", shutil.rmtree, "model", "no such folder"),
    case("empty folder", only(), "config.json"),
    case("no config", lambda m: (m / "config.json").unlink(), "config.json", "no such file"),
    case("config is cut", content("config.json", b'{"model_type": "gpt'), "config.json", "not valid JSON"),
    case("config is empty", content("config.json", b""), "config.json", "not valid JSON"),
    case("config is no UTF-8", content("config.json", b'{"\xff": 1}'), "config.json", "not valid JSON"),
    case("config is a list", content("config.json", b"[]"), "config.json"),
    case("config is null", content("config.json", b"null"), "config.json"),
    case("config nested too deep", content("config.json", DEEP), "config.json"),
    case("config has an endless number", content("config.json", b"9" * 5000), "config.json"),
    case("config is a folder", folder_instead("config.json"), "config.json"),
]


@pytest.mark.parametrize(("damage", "says"), FOLDERS)
def test_folder(damage: Damage, says: tuple[str, ...], model: Path, ranking: Path, refused: Refused) -> None:
    damage(model)
    refused("prune", model, "--ranking", ranking, "--keep", 4, "--out", "out", says=says)


def test_model_that_is_a_file(ranking: Path, refused: Refused) -> None:
    refused(
        "prune", ranking, "--ranking", ranking, "--keep", 4, "--out", "out", says=("ranking.json", "no such folder")
    )


def special(**names: Any) -> Damage:
    """Change the names of special tokens, which two files give."""

    def damage(m: Path) -> None:
        (m / "special_tokens_map.json").unlink()
        edit(m / "tokenizer_config.json", **names)

    return damage


def code_of_its_own(m: Path) -> None:
    (m / "evil.py").write_text("open('stolen', 'w').close()\nclass Evil: pass\n")
    special(tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})(m)


EVERYWHERE = {
    "no config": (lambda m: (m / "config.json").unlink(), "config.json"),
    "another kind of model": (lambda m: edit(m / "config.json", model_type="llama"), "gpt_oss"),
    "an unknown key": (lambda m: edit(m / "config.json", moe_layer_freq=2), "'moe_layer_freq'"),
    "more experts than any model": (lambda m: edit(m / "config.json", num_local_experts=10**18), "num_local_experts"),
    "a truncated shard": (cut(-200), "truncated"),
    "a missing shard": (lambda m: (m / SHARD).unlink(), SHARD),
}


@pytest.mark.parametrize("damage", EVERYWHERE)
@pytest.mark.parametrize("command", ["profile", "prune", "convert", "generate", "plan"])
def test_every_command_that_takes_a_model(
    command: str, damage: str, argv: list[Any], model: Path, refused: Refused
) -> None:
    harm, says = EVERYWHERE[damage]
    if command == "plan" and "shard" in damage:
        pytest.skip("plan reads no weights")
    harm(model)
    refused(*argv, *([] if command in ("generate", "plan") else ["--out", "out"]), says=(says,))


TOKENIZERS = [
    case("no tokenizer", lambda m: (m / "tokenizer.json").unlink(), "tokenizer.json", "copy"),
    case("tokenizer is no JSON", content("tokenizer.json", b"{"), "tokenizer"),
    case("tokenizer is empty", content("tokenizer.json", b""), "tokenizer"),
    case("tokenizer is another object", content("tokenizer.json", b"{}"), "tokenizer"),
    case("its config is no JSON", content("tokenizer_config.json", b"{"), "tokenizer"),
    case("larger vocabulary", lambda m: tokenizers.write_small(m, 900), "vocab_size is 320", "do not belong together"),
    case("code of its own", code_of_its_own, "code of its own", "copy"),
    case("no end of text", special(eos_token=...), "eos_token"),
    case("end of text behind the vocabulary", special(eos_token="<|new|>"), "vocab_size"),
]


@pytest.mark.parametrize(("damage", "says"), TOKENIZERS)
def test_tokenizer(damage: Damage, says: tuple[str, ...], model: Path, rows_jsonl: Path, refused: Refused) -> None:
    damage(model)
    refused("profile", model, "--data", rows_jsonl, "--pack", "--out", "out", *SHORT, says=says)


NAN, INF = float("nan"), float("inf")
DOWN, GATE_UP = "model.layers.2.mlp.experts.down_proj_bias", "model.layers.2.mlp.experts.gate_up_proj_bias"
NUMBERS = [
    case("NaN in an expert", (DOWN, (4, 3), NAN), DOWN + ", expert 4:", "NaN"),
    case("infinity in an expert", (DOWN, (4, 3), INF), DOWN + ", expert 4:"),
    case("overflow in an expert", (DOWN, (4, 3), 3e38), "statistics of layer 2, expert 4 "),
    case("NaN before the gate", (GATE_UP, (5, 2), NAN), GATE_UP + ", expert 5:"),
    case("infinity before the gate", (GATE_UP, (5, 2), INF), GATE_UP + ", expert 5:"),
    case("NaN in the router", ("model.layers.1.mlp.router.bias", (3,), NAN), "model.layers.1."),
    case("NaN in attention", ("model.layers.1.self_attn.o_proj.bias", (0,), NAN), "model.layers.1."),
    case("NaN in the embedding", ("model.embed_tokens.weight", (6, 0), NAN), "NaN"),
]


@pytest.mark.parametrize(("where", "says"), NUMBERS)
def test_no_number(
    where: tuple[Any, ...], says: tuple[str, ...], model: Path, rows_jsonl: Path, refused: Refused
) -> None:
    poke(model, *where)
    refused("profile", model, "--data", rows_jsonl, "--out", "out", *SHORT, says=says)


def test_no_number_in_the_unembedding(model: Path, rows_jsonl: Path, refused: Refused) -> None:
    poke(model, "lm_head.weight", (5, 0), NAN)
    refused("profile", model, "--data", rows_jsonl, "--eaft", "--out", "out", *SHORT, says=("NaN",))


@pytest.mark.parametrize("value", [NAN, INF])
def test_no_number_becomes_mxfp4(
    value: float, tiny_bf16: Path, tmp_path: Path, ranking: Path, refused: Refused
) -> None:
    model = Path(shutil.copytree(tiny_bf16, tmp_path / "model"))
    poke(model, "model.layers.1.mlp.experts.down_proj", (3, 0, 0), value)
    says = ("model.layers.1.mlp.experts.down_proj", "expert 3")
    refused("prune", model, "--ranking", ranking, "--keep", 4, "--format", "mxfp4", "--out", "out", says=says)


def test_size_that_mxfp4_cannot_hold(tmp_path: Path, ranking: Path, refused: Refused) -> None:
    model = tmp_path / "model"
    model.mkdir()
    checkpoints.write_random(model, replace(TINY, expert_hidden_size=48), mxfp4=False)
    refused("prune", model, "--ranking", ranking, "--keep", 4, "--format", "mxfp4", "--out", "out", says=("48", "32"))
