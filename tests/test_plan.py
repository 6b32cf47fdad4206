"""`plan`: the reader of compiled text, the closed formulas, the search, and a real compilation for a TPU slice."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from gptoss_jax.config import GPT_OSS_20B, GPT_OSS_120B, TINY
from gptoss_jax.devices import mesh as sharding
from gptoss_jax.devices import topologies
from gptoss_jax.errors import CompilerError, ConfigError, MeshError
from gptoss_jax.interface import jobs
from gptoss_jax.kernels import splash
from gptoss_jax.pods import hlo, plan, words

from .bad_input import Refused

pytestmark = pytest.mark.slow

CASE = plan.Case(GPT_OSS_20B, "v5e:2x4", 2, 4, "bf16", 16, 2048)


def test_products_in_loops_count_as_often_as_they_run():
    @jax.jit
    def loops(x, w):
        return lax.scan(lambda y, _: (lax.fori_loop(0, 3, lambda _, z: jnp.tanh(z @ w), y), None), x, length=5)[0] @ w

    text = loops.lower(jnp.ones((7, 11)), jnp.ones((11, 11))).compile().as_text()
    assert hlo.dot_flops(hlo.parse(text)) == (5 * 3 + 1) * 2 * 7 * 11 * 11


TPU_TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=8

FileNames
1 "steps.py"

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%add (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  %r = f32[] parameter(1)
  ROOT %l_plus_r = f32[]{:T(128)} add(%l, %r)
}

%reduced (q: f32[64,96]) -> bf16[64,96] {
  %q = f32[64,96]{1,0:T(8,128)} parameter(0)
  ROOT %sum = bf16[64,96]{1,0} all-reduce(%q), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}, execution_thread="sparsecore"

%body (p: (s32[], bf16[64,96])) -> (s32[], bf16[64,96]) {
  %p = (s32[]{:T(128)}, bf16[64,96]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element((s32[]{:T(128)}, bf16[64,96]{1,0:T(8,128)(2,1)}) %p), index=0
  %x = bf16[64,96]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %w = bf16[96,96]{1,0} constant({...})
  %dot = f32[64,96]{1,0:T(8,128)} convolution(%x, %w), dim_labels=bf_io->bf, operand_precision={highest,highest}
  %begun = ((f32[64,96]{1,0:T(8,128)}), bf16[64,96]{1,0}, u32[]{:S(2)}) async-start(%dot), calls=%reduced
  %all = (f32[64,8]{1,0}, f32[64,32]{1,0}) all-gather-start(%dot), replica_groups=[2,4]<=[8], dimensions={1}
  %passed = f32[64,8]{1,0} collective-permute(%dot), source_target_pairs={{0,1},{1,0}}, control-predecessors={%all}
  %gmm.4 = f32[64,96]{1,0} custom-call(%x, /*index=1*/%w), custom_call_target="t", frontend_attributes={kernel={
"metadata":"{\\"calls=%nothing\\": 1"
}}, x={"flops":"1000"}
  %ended = bf16[64,96]{1,0} async-done(%begun), calls=%reduced
  ROOT %t = (s32[]{:T(128)}, /*index=1*/bf16[64,96]{1,0:T(8,128)(2,1)}) tuple(%i, %ended)
}

%condition (p.1: (s32[], bf16[64,96])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, bf16[64,96]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %n = s32[]{:T(128)} constant(24), metadata={op_name="x"}
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %n), direction=LT
}

ENTRY %main (a: bf16[64,96]) -> bf16[64,96] {
  %a = bf16[64,96]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %tuple = (s32[]{:T(128)}, bf16[64,96]{1,0:T(8,128)(2,1)}) tuple(%zero, %a)
  %loop = (s32[]{:T(128)}, bf16[64,96]{1,0:T(8,128)(2,1)}) while(%tuple), condition=%condition, body=%body
  ROOT %out = bf16[64,96]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""


def test_the_text_of_a_tpu_program_is_understood():
    parsed = hlo.parse(TPU_TEXT)
    assert hlo.dot_flops(parsed) == 24 * 2 * 64 * 96 * 96
    assert hlo.kernel_flops(parsed, "gmm") == 24 * 1000
    assert [copied.name for copied in hlo.copies(parsed)] == ["all"]
    reduced, gathered, passed = hlo.collectives(parsed)
    assert (reduced.op, reduced.group, reduced.times, reduced.result_bytes) == ("all-reduce", 4, 24, 64 * 96 * 2)
    assert (gathered.op, gathered.group, gathered.times, gathered.result_bytes) == ("all-gather", 4, 24, 64 * 32 * 4)
    # Along a ring of 4 an all-reduce sends 3/4 of everything twice, an all-gather once.
    assert reduced.moved_bytes == 1.5 * 64 * 96 * 2 and gathered.moved_bytes == 0.75 * 64 * 32 * 4
    assert passed.moved_bytes == passed.result_bytes == 64 * 8 * 4


@pytest.mark.parametrize(
    "groups",
    [
        "[2,4]<=[4,2]T(1,0)",
        "mesh['data'=2,'expert'=4] {'expert'}",
        "mesh['a'=2,'b'=2,'c'=2] {'c','a'}",
        "mesh['data'=2,'expert'=4], device_ids=([4,2]T(1,0)) {'expert'}",
        "mesh['x'=8] {'x':(2)4}",
    ],
)
def test_groups_of_devices_are_understood_in_each_of_their_forms(groups: str):
    """Mesh axes are how libtpu 0.0.50 writes them."""
    text = TPU_TEXT.replace("{{0,1,2,3},{4,5,6,7}}", groups)
    assert hlo.collectives(hlo.parse(text))[0].group == 4


def read(text: str) -> float:
    """All figures of a text."""
    program = hlo.parse(text)
    moved = sum(found.moved_bytes for found in hlo.collectives(program))
    return moved + hlo.dot_flops(program) + hlo.kernel_flops(program, "gmm") + len(hlo.copies(program))


@pytest.mark.parametrize(
    ("told", "otherwise"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", "replica_groups={{0,1,2,3},{4,5}}"),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", "replica_groups={}"),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", "replica_groups=mesh['data'=2] {'expert'}"),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, ", ""),
        (", source_target_pairs={{0,1},{1,0}}", ""),
        (" all-reduce(", " all-reduce-scatter("),
        (" all-reduce(", " collective-broadcast("),
        ("ROOT %sum = bf16[64,96]{1,0}", "ROOT %sum = f3[64,96]{1,0}"),
        ("%sum = bf16[64,96]{1,0}", "%sum = bf16[<=64,96]{1,0}"),
        ("calls=%reduced\n  %all", "calls=%missing\n  %all"),
        ("calls=%reduced", "made_of=reduced"),
        ("convolution(%x, %w)", "convolution(%x, %v)"),
        ("convolution(%x, %w)", "convolution(x, w)"),
        ("dim_labels=bf_io->bf", "window={pad=0_1}, dim_labels=bf_io->bf"),
        ("dim_labels=bf_io->bf, ", ""),
        ('x={"flops":"1000"}', "x={}"),
        ("%gmm.4 =", "%mmg.4 ="),
        (", body=%body", ""),
        ("constant(24)", "constant(-1)"),
        ("%body (p:", "body (p:"),
        ("ENTRY %main", "%main"),
        ("StackFrames", "StackedFrames"),
        ('1 "steps.py"', "steps.py"),
        ("}}, x=", "}, x="),
        ("}}, x=", "}}}, x="),
        ("  %ended =", "  %begun ="),
    ],
)
def test_a_text_that_is_not_understood_is_an_error_and_no_zero(told: str, otherwise: str):
    assert told in TPU_TEXT and read(TPU_TEXT)
    with pytest.raises(CompilerError, match=r"not understood, near .+report this line") as refused:
        read(TPU_TEXT.replace(told, otherwise))
    assert "\n" not in str(refused.value)


def test_a_text_that_ends_early_is_an_error():
    lines = TPU_TEXT.splitlines()
    assert read("\n".join(lines))
    for end in range(len(lines)):
        with pytest.raises(CompilerError):
            read("\n".join(lines[:end]))


@pytest.mark.parametrize("length", [1, 100, 128, 600, 2048])
@pytest.mark.parametrize("window", [None, 9, 128, 300])
def test_visited_scores_are_the_blocks_that_the_mask_touches(length: int, window: int | None):
    S = splash.padded_length(length)
    queries, keys = min(splash.QUERIES, S), min(splash.KEYS if window is None else splash.KEYS_IN_WINDOW, S)
    mask = masks.CausalMask((S, S)) if window is None else masks.LocalMask((S, S), (window - 1, 0), 0)
    blocks = mask[:, :].reshape(S // queries, queries, S // keys, keys).any((1, 3))
    assert splash.visited_scores(length, window) == blocks.sum() * queries * keys


@pytest.mark.parametrize("length", [1, 5, 9, 40])
def test_active_flops_are_what_counting_gives(length: int):
    c = TINY
    pairs = {kind: np.tri(length, dtype=int) for kind in set(c.layer_types)}
    pairs["sliding_attention"] = pairs["sliding_attention"] - np.tri(length, k=-c.sliding_window, dtype=int)
    D, H, K, h, E, k, F = 64, 10, 5, 14, 7, 3, 96
    token = 2 * D * H * h + 2 * 2 * D * K * h + 2 * H * h * D + 2 * D * E + k * (2 * D * 2 * F + 2 * F * D)
    scores = sum(pairs[kind].sum() for kind in c.layer_types) * H * 2 * 2 * h
    case = plan.Case(c, "", 1, 1, "bf16", 3, length)
    assert plan.active_matmul_flops(case) == 3 * (length * c.num_layers * token + scores)


MEMORY = 15.75
# GiB a chip that 120b in four bits takes on v5e:2x4, by rows of 2,048 tokens: not quite a line. 112 do not fit.
TAKEN = {1: 9.556, 8: 9.711, 16: 10.31, 32: 12.42, 64: 12.63, 80: 13.69, 96: 14.13, 128: 17.47, 256: 27.5}
MXFP4 = plan.Case(GPT_OSS_120B, "v5e:2x4", 1, 8, "mxfp4", 16, 2048)


def step(case: plan.Case, needed: float) -> plan.Compiled:
    sizes = (int(gib * 2**30) for gib in (needed, MEMORY))
    return plan.Compiled(case, *sizes, seconds=0.0, program=hlo.Program() if needed <= MEMORY else hlo.NOTHING)


def recorded(case: plan.Case) -> plan.Compiled:
    return step(case, float(np.interp(case.batch, list(TAKEN), list(TAKEN.values()))))


@pytest.mark.parametrize("asked", [1, 2, 4, 16, 64, 96, 110, 111, 112, 128, 200, 256])
def test_the_largest_batch_is_found_by_three_compilations_at_most(asked: int):
    found = plan.largest_batch(recorded(replace(MXFP4, batch=asked)), recorded)
    assert found.tried[0].case.batch == asked and len({s.case.batch for s in found.tried}) == len(found.tried) <= 3
    assert found.compiled and found.batch <= 111 < 2 * found.batch  # what doubling finds
    fit = [s.case.batch for s in found.tried if s.fits]
    assert found.batch == max(fit) and f"{found.batch} fit" in found.how()
    for over in {s.case.batch for s in found.tried} - set(fit):
        assert f"{over} do not" in found.how() or over > found.batch + 1


@pytest.mark.parametrize(
    ("asked", "fixed", "a_row", "named", "how"),
    [
        # A small model ends at a million tokens, or at what was asked for where that is more.
        (16, 0.1, 1e-4, 512, "compiled at 16, 256 and 512 rows: 512 fit, more were not compiled"),
        (1024, 0.1, 1e-4, 1024, "compiled at 1024 rows: 1024 fit, more were not compiled"),
        # Rows are split over two: one for each is the least.
        (16, 15.6, 0.1, 0, "compiled at 16 and 2 rows: none fits"),
        (4, 15.5, 0.1, 2, "compiled at 4 and 2 rows: 2 fit, 4 do not"),
        # Far more memory a row than the closed slope says.
        (512, 0.1, 5.0, 2, "compiled at 512 and 2 rows: 2 fit, 512 do not; nothing between was compiled"),
    ],
)
def test_where_the_search_ends(asked: int, fixed: float, a_row: float, named: int, how: str):
    def compile_step(case: plan.Case) -> plan.Compiled:
        return step(case, fixed + a_row * case.batch)

    found = plan.largest_batch(compile_step(replace(CASE, batch=asked)), compile_step)
    assert (found.batch, found.compiled, found.how()) == (named, True, how)


def test_what_is_extrapolated_is_said():
    """No step of three fits, and the fourth is not compiled."""
    needed = iter((30.0, 16.5, 15.9))

    def compile_step(case: plan.Case) -> plan.Compiled:
        return step(case, next(needed))

    found = plan.largest_batch(compile_step(replace(CASE, batch=512)), compile_step)
    assert len(found.tried) == 3 and not found.compiled and 0 < found.batch < found.tried[-1].case.batch
    assert found.how().endswith(f"rows: none fits; {found.batch} are extrapolated, not compiled")
    said = plan.figures(found.tried[0], found)
    assert said["largest_batch"] == found.batch and said["largest_batch_compiled"] is False
    assert f"--batch-size {found.batch} should fit, which is extrapolated" in str(words.refusal(found.tried[0], found))


def test_a_step_that_does_not_fit_says_by_how_much_and_what_would():
    over = plan.Compiled(CASE, 3 << 30, 2 << 30, 0.0)
    eight = plan.Compiled(replace(CASE, batch=8), 1 << 30, 2 << 30, 0.0, program=hlo.Program())
    assert "3.00 GiB of 2.00 on each chip of v5e:2x4, 1.00 too much: --batch-size 8 fits" in str(
        words.refusal(over, plan.Largest((over, eight)))
    )
    none = plan.Largest((over, replace(over, case=replace(CASE, batch=2))))
    message = str(words.refusal(over, none))
    assert "--weights mxfp4" in message and "--mesh data=1,expert=8" in message and "more chips" in message
    widest = replace(over, case=replace(CASE, data=1, expert=8, weights="mxfp4", batch=1))
    assert str(words.refusal(widest, plan.Largest((widest,)))).endswith("too much: a slice with more chips holds more")


libtpu = pytest.mark.skipif(not topologies.has_compiler(), reason="needs libtpu, of the extra tpu")


@libtpu
@pytest.mark.parametrize("family", topologies.SLICES)
def test_all_slices_that_are_listed_exist(family: str):
    for shape in topologies.SLICES[family]:
        chips = np.prod([int(n) for n in shape.split("x")])
        devices = topologies.devices(f"{family}:{shape}")
        assert len(devices) == chips * (2 if family == "tpu7x" else 1)
        assert devices[0].device_kind in topologies.CHIPS


TWO_LAYERS = replace(
    GPT_OSS_20B,
    num_layers=2,
    layer_types=GPT_OSS_20B.layer_types[:2],
    hidden_size=256,
    expert_hidden_size=384,
    num_heads=16,
    num_kv_heads=8,
    vocab_size=512,
)


@libtpu
@pytest.mark.parametrize("weights", ["bf16", "mxfp4"])
def test_a_compiled_step_is_what_the_formulas_say(weights: str):
    """For v5e:2x4, with real kernels: no gather and no copy of weights, sums and FLOPs as stated."""
    case = plan.Case(TWO_LAYERS, "v5e:2x4", 2, 4, weights, 8, 1024)
    step = plan.compile_step(case)
    assert step.fits and step.memory_bytes == int(15.75 * 2**30)
    a_layer, _ = plan.collective_bytes(step)
    assert a_layer == plan.expected_collective_bytes(case)
    c = TWO_LAYERS
    projections = 2 * c.hidden_size * (2 * c.num_heads * 64 + 2 * c.num_kv_heads * 64 + c.num_experts)
    assert hlo.dot_flops(step.program) * 8 == case.tokens * c.num_layers * projections
    gathered = [x for x in hlo.collectives(step.program) if x.op != "all-reduce"]
    assert [x.result_bytes for x in gathered] == [case.tokens // 2 * c.num_experts * 4]  # the router's scores
    assert plan.moved_weights(step) == []


@libtpu
def test_a_step_that_does_not_fit_is_known_by_what_the_compiler_says_of_it():
    step = plan.compile_step(plan.Case(TWO_LAYERS, "v5e:2x4", 2, 4, "mxfp4", 16384, 2048))
    # At least what the experts' sums take in float32, of which each chip holds half of the tokens'.
    assert not step.fits and step.needed_bytes > step.memory_bytes and step.needed_bytes > 8192 * 2048 * 256 * 4


@libtpu
def test_what_cannot_be_planned_is_said_in_one_line(refused: Refused, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS_120B.to_json()))
    assert "v5e:2x2, 2x4" in refused("plan", "gpt-oss-20b", "--topology", "v5e:3x3")
    assert "8 places" in refused("plan", "gpt-oss-20b", "--topology", "v5e:2x2", "--mesh", "data=2,expert=4")
    assert "does not divide" in refused("plan", str(tmp_path), "--topology", "v5e:4x4", "--mesh", "data=1,expert=16")
    assert "--batch-size" in refused(
        "plan", str(tmp_path), "--topology", "v5e:2x4", "--mesh", "data=8,expert=1", "--batch-size", "3"
    )
    assert "context" in refused("plan", "gpt-oss-20b", "--topology", "v5e:2x2", "--max-seq-length", "200000")


HUGE = 10**18
ABSURD = {
    "experts": ({"num_experts": HUGE}, "more than a million million GiB for weights"),
    "everything": (dict.fromkeys(("num_experts", "num_heads", "num_kv_heads", "vocab_size"), HUGE), "for weights"),
    "words": ({"vocab_size": HUGE}, "335,276,126,863 GiB for weights"),
    "heads": ({"head_dim": HUGE}, "GiB for weights"),
    "experts' size": ({"expert_hidden_size": 10**300}, "for weights"),
    "rows": ({"batch": 1 << 20}, "2,147,483,648 on each of data=1, and more than 16,777,216 are not compiled"),
    "digits": ({"batch": 10**400}, "are not compiled: make --batch-size or --max-seq-length smaller"),
    "context": ({"max_position": HUGE, "seq_len": 10**15}, "are not compiled"),
    "states": ({"hidden_size": 1 << 20, "num_layers": 0, "vocab_size": 8, "batch": 1 << 12}, "GiB for tokens"),
}


@libtpu
@pytest.mark.parametrize("name", ABSURD)
def test_absurd_numbers_are_refused_before_anything_is_compiled(name: str):
    """The compiler ends the process where numbers are too large for it."""
    changes, says = ABSURD[name]
    own = {key: changes[key] for key in ("batch", "seq_len") if key in changes}
    config = replace(GPT_OSS_20B, **{key: value for key, value in changes.items() if key not in own})
    with pytest.raises(MeshError, match=re.escape(says)) as refusal:
        replace(CASE, config=config, data=1, expert=8, **own).mesh()
    assert "\n" not in str(refusal.value)


@libtpu
def test_absurd_numbers_of_a_file_and_of_options_are_one_line(refused: Refused, tmp_path: Path):
    file = tmp_path / "config.json"
    for keys in ({"num_local_experts": HUGE}, {"vocab_size": HUGE}, {"intermediate_size": 10**300}):
        file.write_text(json.dumps(GPT_OSS_20B.to_json() | keys))
        refused("plan", str(tmp_path), "--topology", "v5e:2x4")
    file.write_text(json.dumps(GPT_OSS_20B.to_json()))
    for value in (10**15, 10**400):
        refused("plan", str(tmp_path), "--topology", "v5e:2x4", "--batch-size", value, says=("are not compiled",))


def test_published_models_are_known_by_their_hub_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Without a download; a folder of that name that is there comes first."""
    monkeypatch.chdir(tmp_path)
    assert jobs._config("openai/gpt-oss-120b") == jobs._config("gpt-oss-120b") == GPT_OSS_120B
    (tmp_path / "openai" / "gpt-oss-20b").mkdir(parents=True)
    (tmp_path / "openai" / "gpt-oss-20b" / "config.json").write_text(json.dumps(TINY.to_json()))
    assert jobs._config("openai/gpt-oss-20b") == TINY
    with pytest.raises(ConfigError):
        jobs._config("someone/gpt-oss-20b")


def test_the_expert_axis_of_numbers_without_end_is_found_at_once():
    endless = replace(GPT_OSS_20B, num_experts=HUGE, num_kv_heads=HUGE, num_heads=HUGE, vocab_size=HUGE)
    assert sharding.default_sizes(endless, 96) == (3, 32)
    assert max(sharding.expert_sizes(endless)) <= sharding.MOST_DEVICES


def test_the_error_of_a_full_device_is_read():
    message = "the total memory required for HLO temporaries (28.97G) exceeds available HBM (15.75G)."
    assert topologies.does_not_fit(MemoryError(message)) == (int(28.97 * 2**30), int(15.75 * 2**30))
    assert topologies.does_not_fit(MeshError("something else")) is None
