"""The command `prune`: what is cut, what is copied, and that the cut model is the masked full model."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from convert import checksums, mxfp4, shards
from convert import cut as cut_module
from convert.hf import Checkpoint
from convert.mapping import LAYER
from gptoss_jax.cli import cli
from gptoss_jax.config import TINY
from gptoss_jax.errors import CheckpointError, OptionError, OutputError, RankingError
from gptoss_jax.network import source as weights
from gptoss_jax.selection.keep_sets import KeepSets
from gptoss_jax.selection.origin import Origin
from gptoss_jax.selection.ranking import Ranking
from tests.oracle import needs_torch

KEEP = 4
RANKING = [np.random.default_rng(layer).permutation(TINY.num_experts).tolist() for layer in range(TINY.num_layers)]
KEEP_SETS = [sorted(experts[:KEEP]) for experts in RANKING]
TOKENS = np.random.default_rng(5).integers(0, TINY.vocab_size, (2, 24)).astype(np.int32)
# Beside weights and config.json: what a published folder also has.
OTHER_FILES = {"LICENSE": b"\xff\x00 no text\r\n", "USAGE_POLICY": b"be kind\n", "merges.extra.json": b'{"b":1,"a":2}'}

Prune = Callable[..., Path]
write_pruned = partial(cut_module.prune, max_shard_bytes=10**9)


def run(model: Path, out: Path, *options: str | Path) -> Path:
    arguments = ["prune", model, "--out", out, *options]
    # Words of a shell are objects of their own, equal to the program's texts and not the same.
    words = ["".join([*str(a)]) for a in arguments]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out


def raw_file(file: Path) -> dict[str, Any]:
    """Every tensor of one shard, by the safetensors library."""
    needs_torch()
    from safetensors.torch import load_file

    return load_file(file)


def raw(folder: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in raw_file(file).items()}


def assert_same_bytes(found: dict[str, Any], expected: dict[str, Any]) -> None:
    torch = needs_torch()

    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        same = found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)
        assert torch.equal(*same), name


def is_cut(name: str) -> bool:
    return ".mlp.experts." in name or ".mlp.router." in name


def layer_of(name: str) -> int:
    return int(name.split(".")[2])


def cut(tensors: dict[str, Any], keep_sets: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The obvious way: rows of the kept experts of every tensor that counts experts."""
    return {name: t[list(keep_sets[layer_of(name)])] if is_cut(name) else t for name, t in tensors.items()}


def dequantised(tensors: dict[str, Any]) -> dict[str, Any]:
    """Blocks and scales replaced by the values that transformers gives them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    found = {name: t for name, t in tensors.items() if not name.endswith(("_blocks", "_scales"))}
    for name in (name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")):
        found[name] = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
    return found


@pytest.fixture(scope="module")
def ranking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("ranking") / "science.json"
    file.write_text(json.dumps(RANKING))
    return file


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, tiny_mxfp4: Path, tiny_bf16: Path) -> dict[str, Path]:
    """The two tiny checkpoints, with the other files and the odd keys of a published folder."""
    found = {}
    for form, folder in (("mxfp4", tiny_mxfp4), ("bf16", tiny_bf16)):
        copy = Path(shutil.copytree(folder, tmp_path_factory.mktemp("source") / form))
        for name, content in OTHER_FILES.items():
            (copy / name).write_bytes(content)
        config = {"eos_token_id": 2} | json.loads((copy / "config.json").read_text())
        config |= {
            "rope_theta": 5000,
            "transformers_version": "4.55.0.dev0",
            "task_specific_params": [{"z": 0, "a": 1}],
        }
        (copy / "config.json").write_text(json.dumps(config))
        found[form] = copy
    return found


@pytest.fixture(scope="module")
def prune(tmp_path_factory: pytest.TempPathFactory, sources: dict[str, Path], ranking: Path) -> Prune:
    """`prune(source, form, keep)`: the checkpoint that the command writes, made once."""
    made: dict[tuple[str, str, int], Path] = {}

    def once(source: str, form: str = "same", keep: int = KEEP) -> Path:
        if (source, form, keep) not in made:
            options = ["--ranking", ranking, "--keep", keep, "--format", form]
            lower = ["--lower-top-k"] if keep < TINY.top_k else []
            out = tmp_path_factory.mktemp("pruned") / f"{source}-{form}-{keep}"
            made[source, form, keep] = run(sources[source], out, *options, *lower)
        return made[source, form, keep]

    return once


SOURCES = pytest.mark.parametrize("source", ["mxfp4", "bf16"])
FORMS = pytest.mark.parametrize(
    ("source", "form"), [("mxfp4", "same"), ("bf16", "same"), ("mxfp4", "bf16"), ("bf16", "mxfp4")]
)


@SOURCES
def test_kept_bytes_do_not_change(sources: dict[str, Path], prune: Prune, source: str) -> None:
    """Blocks, scales, biases and router rows of kept experts, and every other tensor."""
    before = raw(sources[source])
    assert any(name.endswith("_scales") for name in before) == (source == "mxfp4")
    assert_same_bytes(raw(prune(source)), cut(before, KEEP_SETS))


@SOURCES
def test_keeping_all_reproduces_every_tensor(sources: dict[str, Path], prune: Prune, source: str) -> None:
    assert_same_bytes(raw(prune(source, keep=TINY.num_experts)), raw(sources[source]))


@pytest.mark.parametrize("form", ["mxfp4", "bf16"])
def test_naming_the_format_it_has_changes_nothing(prune: Prune, form: str) -> None:
    assert_same_bytes(raw(prune(form, form)), raw(prune(form)))


def test_mxfp4_to_bf16_is_the_dequantised_model(sources: dict[str, Path], prune: Prune) -> None:
    assert_same_bytes(raw(prune("mxfp4", "bf16")), cut(dequantised(raw(sources["mxfp4"])), KEEP_SETS))


def test_bf16_to_mxfp4_is_nearest(sources: dict[str, Path], prune: Prune) -> None:
    """No value that the block's scale offers lies closer than the one that was written."""
    torch = needs_torch()

    expected, written = cut(raw(sources["bf16"]), KEEP_SETS), raw(prune("bf16", "mxfp4"))
    decoded = dequantised(written)
    kernels = [name for name in expected if name.endswith(("gate_up_proj", "down_proj"))]
    assert len(kernels) == 2 * TINY.num_layers
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for name in kernels:
        wanted, got = (t.pop(name).double().transpose(1, 2) for t in (expected, decoded))
        scales = torch.exp2(written[f"{name}_scales"].double() - 127).repeat_interleave(32, dim=-1)
        offered = scales[..., None] * torch.cat([magnitudes, -magnitudes])
        closest = (offered - wanted[..., None]).abs().amin(-1)
        assert torch.equal((got - wanted).abs(), closest)
        largest = wanted.abs().unflatten(-1, (-1, 32)).amax(-1).repeat_interleave(32, dim=-1)
        assert ((got - wanted).abs() <= largest / 4).all()  # the scale itself is fit
    assert_same_bytes(decoded, expected)


@FORMS
def test_expert_mapping_numbers_kept_experts_in_order(prune: Prune, source: str, form: str) -> None:
    mapping = json.loads((prune(source, form) / "expert_mapping.json").read_text())
    assert list(mapping) == [str(i) for i in range(TINY.num_layers)]
    for layer, kept in enumerate(KEEP_SETS):
        assert mapping[str(layer)] == {str(old): new for new, old in enumerate(kept)}


@FORMS
@pytest.mark.parametrize("keep", [2, KEEP, TINY.num_experts])
def test_config_is_the_sources_but_for_expert_numbers(
    sources: dict[str, Path], prune: Prune, source: str, form: str, keep: int
) -> None:
    """Compared as text, so that 5000 does not become 5000.0, nor the order of keys another."""
    expected = json.loads((sources[source] / "config.json").read_text())
    found = json.loads((prune(source, form, keep) / "config.json").read_text())
    expected["num_local_experts"] = keep
    expected["num_experts_per_tok"] = expected["experts_per_token"] = min(TINY.top_k, keep)
    if form == "bf16":
        del expected["quantization_config"]
    if form == "mxfp4":
        expected["quantization_config"] = found["quantization_config"]
        assert found["quantization_config"]["quant_method"] == "mxfp4"
    assert json.dumps(found) == json.dumps(expected)


def test_keys_that_the_source_lacks_are_not_added(sources: dict[str, Path], ranking: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(sources["bf16"], tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    del config["experts_per_token"]
    (source / "config.json").write_text(json.dumps(config))
    out = run(source, tmp_path / "out", "--ranking", ranking, "--keep", KEEP)
    assert list(json.loads((out / "config.json").read_text())) == list(config)


@SOURCES
def test_other_files_are_copied_byte_for_byte(sources: dict[str, Path], prune: Prune, source: str) -> None:
    def others(folder: Path) -> dict[str, bytes]:
        written = {"config.json", "expert_mapping.json", "README.md", "model.safetensors.index.json", "SHA256SUMS"}
        files = [p for p in folder.iterdir() if p.name not in written and p.suffix != ".safetensors"]
        return {p.name: p.read_bytes() for p in files}

    assert others(prune(source)) == others(sources[source])
    assert set(OTHER_FILES) | {"tokenizer.json", "generation_config.json", "chat_template.jinja"} <= set(
        others(sources[source])
    )


def sums(folder: Path) -> str:
    """What SHA256SUMS should be, the obvious way."""
    files = sorted(contents(folder).items())
    return "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files if name != "SHA256SUMS")


@FORMS
def test_every_file_has_its_digest(prune: Prune, source: str, form: str) -> None:
    assert (prune(source, form) / "SHA256SUMS").read_text() == sums(prune(source, form))


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="no sha256sum here")
def test_sha256sum_reads_the_digests(prune: Prune, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(prune("mxfp4"), tmp_path / "copy"))
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=copy).returncode == 0
    with open(next(copy.glob("*.safetensors")), "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert subprocess.run(check, cwd=copy, capture_output=True).returncode == 1


def test_digests_of_the_source_are_not_copied(prune: Prune, tmp_path: Path) -> None:
    file = tmp_path / "keep.json"
    file.write_text(json.dumps([[0, 1, 2]] * TINY.num_layers))
    out = run(prune("mxfp4"), tmp_path / "out", "--keep-sets", file)
    assert (out / "SHA256SUMS").read_text() == sums(out)


def test_verify_changes_nothing_in_what_is_written(
    sources: dict[str, Path], prune: Prune, ranking: Path, tmp_path: Path
) -> None:
    out = run(sources["mxfp4"], tmp_path / "out", "--ranking", ranking, "--keep", KEEP, "--verify")
    assert contents(out) == contents(prune("mxfp4"))


@pytest.mark.parametrize("damaged", ["model-00001-of-00001.safetensors", "config.json", "LICENSE"])
def test_verify_finds_a_byte_that_differs(
    sources: dict[str, Path], ranking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    real = checksums.write

    def damaging(folder: Path, known: Any) -> None:
        real(folder, known)
        data = bytearray((folder / damaged).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / damaged).write_bytes(data)

    monkeypatch.setattr(checksums, "write", damaging)
    options = ["--ranking", ranking, "--keep", KEEP]
    with pytest.raises(OutputError, match=f"out/{damaged}: reads back otherwise"):
        run(sources["mxfp4"], tmp_path / "out", *options, "--verify")
    assert not list(tmp_path.iterdir())
    run(sources["mxfp4"], tmp_path / "out", *options)  # which does not look


def test_verify_finds_a_shard_that_was_written_otherwise(
    sources: dict[str, Path], ranking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests are of what was to be written, not of what can be read afterwards."""
    real = shards._write_shard

    def losing(path: Path, *args: Any) -> Iterator[int]:
        yield from real(path, *args)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(shards, "_write_shard", losing)
    with pytest.raises(OutputError, match=r"model-00001-of-00001\.safetensors: reads back otherwise"):
        run(sources["mxfp4"], tmp_path / "out", "--ranking", ranking, "--keep", KEEP, "--verify")


def test_a_remote_source_gives_the_same_files(
    sources: dict[str, Path], prune: Prune, ranking: Path, tmp_path: Path
) -> None:
    from upath import UPath

    remote = UPath("memory://pruned/mxfp4")
    remote.mkdir(parents=True)
    for name, data in contents(sources["mxfp4"]).items():
        (remote / name).write_bytes(data)
    try:
        result = CliRunner().invoke(
            cli,
            ["prune", str(remote), "--ranking", str(ranking), "--keep", str(KEEP), "--out", str(tmp_path / "out")],
            catch_exceptions=False,
        )
    finally:
        remote.fs.rm("/pruned", recursive=True)
    assert result.exit_code == 0, result.output
    weights = {name: data for name, data in contents(prune("mxfp4")).items() if name.endswith(".safetensors")}
    assert weights and weights.items() <= contents(tmp_path / "out").items()


@pytest.mark.parametrize("path", ["moe/experts/gate_up_kernel", "moe/experts/down_kernel"])
def test_decoding_by_bytes_is_decoding_and_rearranging(path: str) -> None:
    """All bytes under all scales, NaN's and infinity's included."""
    (tensor,) = (row for row in LAYER if row.path == path)
    shape = (2, *tensor.blocks_shape(TINY)[1:])
    rng = np.random.default_rng(3)
    for scale in range(256):
        blocks = np.resize(rng.permutation(256).astype(np.uint8), shape)
        scales = rng.integers(0, 256, shape[:-1], np.uint8)
        scales[0] = scale
        with np.errstate(over="ignore", invalid="ignore"):
            expected = tensor.mxfp4_to_hf(mxfp4.decode(blocks, scales), TINY)
        found = cut_module.decode_to_hf(blocks, scales, tensor, TINY)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()


def test_weights_in_other_forms_stay_behind(sources: dict[str, Path], ranking: Path, tmp_path: Path) -> None:
    """They hold all experts, and a client that prefers them would load the model that was pruned."""
    source = Path(shutil.copytree(sources["bf16"], tmp_path / "source"))
    names = {"pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf"}
    for name in names:
        (source / name).write_bytes(b"{}")
    out = run(source, tmp_path / "out", "--ranking", ranking, "--keep", KEEP)
    assert not names & {p.name for p in out.iterdir()}


def test_the_card_takes_the_place_of_the_sources_readme(
    sources: dict[str, Path], ranking: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(sources["bf16"], tmp_path / "source"))
    (source / "README.md").write_text("The card of the full model.")
    out = run(source, tmp_path / "out", "--ranking", ranking, "--keep", KEEP)
    assert "The card of the full model." not in (out / "README.md").read_text(encoding="utf-8")


def load(folder: Path) -> Any:
    """The model by transformers in float32, which must find every tensor and no other."""
    torch = needs_torch()
    from transformers import GptOssForCausalLM

    torch.set_num_threads(1)  # several wait for one another at each tiny product where cores are shared
    model, info = GptOssForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= set(info)
    assert not any(info.values()), info
    return model.eval()


def logits(model: Any) -> np.ndarray:
    torch = needs_torch()

    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.numpy()


def masked(model: Any, keep_sets: Sequence[Sequence[int]]) -> Any:
    """The full model with the router's bias of all other experts at −∞."""
    torch = needs_torch()

    for layer, kept in zip(model.model.layers, keep_sets, strict=True):
        bias = torch.full_like(layer.mlp.router.bias, -torch.inf)
        bias[kept] = layer.mlp.router.bias[kept]
        layer.mlp.router.bias.data = bias.detach()
    return model


def our_logits(folder: Path, keep_sets: Sequence[Sequence[int]] | None = None) -> np.ndarray:
    from gptoss_jax.data.batching import Document, padded
    from gptoss_jax.devices.placement import here
    from gptoss_jax.run.forward import forward

    source = Checkpoint(folder)
    model = weights.load(source if keep_sets is None else weights.Masked(source, keep_sets), "float32")
    documents = [Document(ids, np.ones(len(ids), np.float32)) for ids in TOKENS]
    (batch,) = padded(documents, *TOKENS.shape)
    return np.asarray(forward(model, batch.tokens, here()).logits)


def best(keep: int) -> list[list[int]]:
    return [sorted(experts[:keep]) for experts in RANKING]


@FORMS
@pytest.mark.parametrize("keep", [2, TINY.top_k, KEEP])
def test_transformers_pruned_equals_masked(
    sources: dict[str, Path], prune: Prune, source: str, form: str, keep: int
) -> None:
    """Also below the model's top k: an expert at −∞ has a gate of 0."""
    full = sources[source] if form != "mxfp4" else prune(source, form, TINY.num_experts)
    pruned = logits(load(prune(source, form, keep)))
    assert np.abs(pruned - logits(masked(load(full), best(keep)))).max() <= 1e-6
    assert np.abs(pruned - logits(load(full))).max() > 1e-3  # the cut experts mattered


@SOURCES
@pytest.mark.parametrize("keep", [TINY.top_k, KEEP])
def test_our_masked_model_equals_the_pruned(sources: dict[str, Path], prune: Prune, source: str, keep: int) -> None:
    pruned = prune(source, keep=keep)
    masked_by_us = our_logits(sources[source], best(keep))
    assert np.abs(our_logits(pruned) - masked_by_us).max() <= 1e-6
    assert np.abs(logits(load(pruned)) - masked_by_us).max() <= 1e-6


@FORMS
def test_our_forward_of_the_pruned_is_transformers(prune: Prune, source: str, form: str) -> None:
    theirs = logits(load(prune(source, form)))
    assert np.abs(our_logits(prune(source, form)) - theirs).max() <= 1e-5 * np.abs(theirs).max()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_both_forms_of_a_ranking_give_the_same_files(sources: dict[str, Path], prune: Prune, tmp_path: Path) -> None:
    file = tmp_path / "science.json"
    # Written in another order, which must not matter.
    file.write_text(json.dumps({f"layer_{i}": RANKING[i] for i in reversed(range(TINY.num_layers))}))
    out = run(sources["mxfp4"], tmp_path / "out", "--ranking", file, "--keep", KEEP)
    assert contents(out) == contents(prune("mxfp4"))


@pytest.mark.parametrize("form", ["lists", "layers", "keep"])
def test_keep_sets_give_the_same_model(sources: dict[str, Path], prune: Prune, tmp_path: Path, form: str) -> None:
    shuffled = [experts[:KEEP] for experts in RANKING]
    layers = {f"layer_{i}": experts for i, experts in enumerate(shuffled)}
    file = tmp_path / "keep.json"
    file.write_text(json.dumps({"lists": shuffled, "layers": layers, "keep": {"keep": shuffled, "why": []}}[form]))
    out = run(sources["mxfp4"], tmp_path / "out", "--keep-sets", file)
    expected, found = contents(prune("mxfp4")), contents(out)
    for name in ("README.md", "SHA256SUMS"):  # the card names the rule by which a ranking became sets
        assert expected.pop(name) != found.pop(name)
    assert found == expected


@pytest.mark.parametrize("kind", ["ranking", "keep-sets"])
def test_files_with_origin_give_the_same_model(
    sources: dict[str, Path], prune: Prune, tmp_path: Path, kind: str
) -> None:
    ranking, file = Ranking(RANKING, Origin("reap", {"science": 1.0})), tmp_path / "file.json"
    (ranking if kind == "ranking" else ranking.keep(KEEP)).write(file)
    options = ["--keep", KEEP] if kind == "ranking" else []
    expected = contents(prune("mxfp4"))
    found = contents(run(sources["mxfp4"], tmp_path / "out", f"--{kind}", file, *options))
    for name in ("README.md", "SHA256SUMS"):
        assert expected.pop(name) != found.pop(name)
    assert found == expected


def test_from_python_as_by_the_command(
    sources: dict[str, Path], prune: Prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, keep_sets = Checkpoint(sources["mxfp4"]), Ranking(RANKING).keep(KEEP)
    made = write_pruned(source, keep_sets, tmp_path / "out", verify=True)
    assert contents(Path(made)) == contents(prune("mxfp4"))
    assert (made.folder, made.num_kept, made.warnings) == (tmp_path / "out", KEEP, ())
    monkeypatch.chdir(tmp_path)
    named = write_pruned(source, keep_sets, format="bf16", domain="law")
    assert named.folder == Path(named.name) and "-specialized-law-" in named.name
    assert_same_bytes(raw(named.folder), raw(prune("mxfp4", "bf16")))


def test_bars_are_told_of_every_byte(sources: dict[str, Path], tmp_path: Path) -> None:
    """One for what is written, one for what is read again."""
    bars: list[tuple[int, list[int]]] = []

    def progress(total: int, unit: str) -> AbstractContextManager[Callable[[int], Any]]:
        assert unit == "B"
        bars.append((total, []))
        return nullcontext(bars[-1][1].append)

    write_pruned(Checkpoint(sources["mxfp4"]), KeepSets(KEEP_SETS), tmp_path / "out", verify=True, progress=progress)
    assert len(bars) == 2 and all(total > 0 for total, _ in bars)
    assert bars[0][0] == sum(bars[0][1])
    assert bars[1][0] - (tmp_path / "out" / checksums.FILE).stat().st_size == sum(bars[1][1])


def test_what_no_checkpoint_can_hold_is_refused_from_python_too(sources: dict[str, Path], tmp_path: Path) -> None:
    source = Checkpoint(sources["mxfp4"])
    for layers, says in (
        ([*KEEP_SETS[:3], [1, 2, 3]], "layers keep 4, 4, 4, 3 experts"),
        (KEEP_SETS[:3], "the keep-sets: has 3 layers"),
        ([*KEEP_SETS[:3], [1, 2, 3, 7]], "layer 3 names expert 7"),
        ([[1, 2]] * 4, "--lower-top-k"),
    ):
        with pytest.raises(RankingError, match=says):
            write_pruned(source, KeepSets(layers), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_small_shards_hold_the_same_content(
    sources: dict[str, Path], prune: Prune, ranking: Path, tmp_path: Path
) -> None:
    options = ["--ranking", ranking, "--keep", KEEP, "--max-shard-size", "60KB"]
    out = run(sources["mxfp4"], tmp_path / "out", *options)
    one, many = (list(folder.glob("*.safetensors")) for folder in (prune("mxfp4"), out))
    assert len(one) == 1
    assert len(many) > 3
    assert all(sum(t.nbytes for t in raw_file(file).values()) <= 60_000 for file in many)
    assert_same_bytes(raw(out), raw(prune("mxfp4")))
    load(out)


def test_overwrite_replaces(sources: dict[str, Path], prune: Prune, ranking: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    with pytest.raises(OutputError, match="--overwrite"):
        run(sources["mxfp4"], out, "--ranking", ranking, "--keep", KEEP)
    assert contents(out) == {"old.txt": b"old"}
    run(sources["mxfp4"], out, "--ranking", ranking, "--keep", KEEP, "--overwrite")
    assert contents(out) == contents(prune("mxfp4"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_below_top_k_must_be_asked_for(sources: dict[str, Path], ranking: Path, tmp_path: Path) -> None:
    with pytest.raises(RankingError, match="--lower-top-k"):
        run(sources["mxfp4"], tmp_path / "out", "--ranking", ranking, "--keep", TINY.top_k - 1)
    assert not list(tmp_path.iterdir())


def test_no_experts_at_all_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "keep.json"
    file.write_text(json.dumps([[]] * TINY.num_layers))
    with pytest.raises(RankingError):
        run(sources["mxfp4"], tmp_path / "out", "--keep-sets", file, "--lower-top-k")


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_weights_that_mxfp4_cannot_hold_are_refused(
    sources: dict[str, Path], ranking: Path, tmp_path: Path, value: float
) -> None:
    """Else a damaged checkpoint becomes one that looks sound."""
    import ml_dtypes

    from convert.shards import find_tensors

    source = Path(shutil.copytree(sources["bf16"], tmp_path / "source"))
    stored = find_tensors(source)["model.layers.1.mlp.experts.down_proj"]
    with open(stored.file, "r+b") as file:
        file.seek(stored.offset + KEEP_SETS[1][0] * stored.nbytes // TINY.num_experts)
        file.write(np.array(value, ml_dtypes.bfloat16).tobytes())
    with pytest.raises(CheckpointError, match=stored.name):
        run(source, tmp_path / "out", "--ranking", ranking, "--keep", KEEP, "--format", "mxfp4")


@pytest.mark.parametrize(
    "size",
    [
        "5XB",
        "-1",
        "",
        "1.2.3GB",
        ".",
    ],
)
def test_what_is_no_size_is_refused(sources: dict[str, Path], ranking: Path, tmp_path: Path, size: str) -> None:
    arguments = ["prune", sources["mxfp4"], "--ranking", ranking, "--keep", KEEP, "--max-shard-size", size]
    with pytest.raises(OptionError, match=r"--max-shard-size is .*: give a size as 5GB"):
        CliRunner().invoke(cli, [*map(str, arguments), "--out", str(tmp_path / "out")], catch_exceptions=False)


@SOURCES
def test_the_source_stays_as_it_was(sources: dict[str, Path], ranking: Path, tmp_path: Path, source: str) -> None:
    before = contents(sources[source])
    run(sources[source], tmp_path / "out", "--ranking", ranking, "--keep", KEEP)
    assert contents(sources[source]) == before
