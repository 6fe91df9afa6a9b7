"""Tests of the compile report, which reads machine code and detects regressions. They need no GPU and no interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the compile report compiles with Triton, which is not installed here")

import triton
import triton.language as tl

import vix_kernels
from vix_kernels import conditions
from vix_kernels._triton.launch import find_tile, launch
from vix_kernels._triton.launch_table import OVERRIDES
from vix_kernels._triton.targets import TARGETS
from vix_kernels.commands import read_csv
from vix_kernels.measure import compile_report, machine_code, offline, shared_memory, sources
from vix_kernels.measure.compile_table import Row, outdated, regressions, violations, write_table

SM90_16_BIT = Row(
    triton="3.9.0", arch="sm_90", dtype="bf16", width=64, kernel="broadcast_kernel", blocks="N:64", warps=4,
    stages=2, registers=168, spilled=0, shared=40960, tensor_memory=0, occupancy=18, matrix="HGMMA:16",
    loads="32:2 128:12", stores="128:4", uses="performer forward 16,110; performer+rope forward 16",
)  # fmt: skip
GFX942 = replace(
    SM90_16_BIT, arch="gfx942", spilled=52, matrix="v_mfma_f32_32x32x8_bf16:80", loads="32:80 128:6", stores="64:4"
)


@triton.jit(do_not_specialize=["N"])
def attention_kernel(q, k, out, stride, N, D: tl.constexpr, BLOCK: tl.constexpr):
    o_n, o_d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    inside = (o_n < N)[:, None]
    b_q = tl.load(q + o_n[:, None] * stride + o_d[None, :], mask=inside, other=0.0)
    b_out = tl.zeros((BLOCK, D), tl.float32)
    for start in range(0, N, BLOCK):
        o_k = start + tl.arange(0, BLOCK)
        b_k = tl.load(k + o_k[:, None] * stride + o_d[None, :], mask=(o_k < N)[:, None], other=0.0)
        b_p = tl.exp2(tl.dot(b_q, tl.trans(b_k)))
        b_out = tl.dot(b_p.to(b_k.dtype), b_k, b_out)
    tl.store(out + o_n[:, None] * stride + o_d[None, :], b_out.to(out.dtype.element_ty), mask=inside)


def compile_toy(target: str) -> list[offline.CompiledLaunch]:
    """Compile two launches on aligned rows with different lengths, and one launch on a view with an offset of one element."""
    x = torch.empty(1024, 64, dtype=torch.bfloat16, device="meta")
    shifted = torch.empty(1024 * 64 + 1, dtype=torch.bfloat16, device="meta")[1:].view(1024, 64)
    meta = {"D": 64, "BLOCK": 64, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    with offline.target(target) as launches:
        launch(attention_kernel, (16,), x, x, x, x.stride(0), 1024, **meta)
        launch(attention_kernel, (1,), x, x, x, x.stride(0), 63, **meta)
        launch(attention_kernel, (16,), shifted, shifted, x, x.stride(0), 1024, **meta)
    return launches


def compile_performer(target: str) -> list[offline.CompiledLaunch]:
    q = torch.empty(2, 4, 1024, 64, dtype=torch.bfloat16)
    projection = torch.empty(110, 64)
    with offline.target(target) as launches:
        vix_kernels.performer_attention(q, q, q, projection, backend="triton")
    return launches


def shared_both_ways(target: str) -> list[int]:
    """Compile the toy kernel only until shared memory is allocated, then fully. Return the bytes of shared memory for both."""
    x = torch.empty(1024, 64, dtype=torch.bfloat16, device="meta")
    meta = {"D": 64, "BLOCK": 64, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    arguments = x, x, x, x.stride(0), 1024
    with offline.capture(target):
        with shared_memory.allocation_only(), pytest.raises(shared_memory.Allocated) as stopped:
            attention_kernel.warmup(*arguments, grid=(16,), **meta)
        complete = attention_kernel.warmup(*arguments, grid=(16,), **meta)
    return [stopped.value.args[0], complete.metadata.shared]


def in_subprocess(function: str, target: str) -> list[dict]:
    """Run a function from this file in a process without Triton's interpreter, and return its result."""
    with compile_report.worker_environment():
        command = [sys.executable, __file__, function, target]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def toy() -> list[dict]:
    return in_subprocess("compile_toy", "sm_90")


def test_equal_specializations_are_compiled_once(toy):
    assert [each["launches"] for each in toy] == [2, 1]
    assert [each["signature"]["q"] for each in toy] == ["*bf16:16", "*bf16"]
    assert toy[0]["constexprs"] == {"D": 64, "BLOCK": 64}


def test_resources_are_read_from_machine_code(toy):
    used = toy[0]["resources"]
    assert 0 < used["registers"] <= 255
    assert used["spilled"] == 0
    assert used["matrix"].keys() == {"HGMMA"}
    assert used["loads"]["128"] > 0 and used["stores"]["128"] > 0
    assert 0 < toy[0]["shared"] <= TARGETS["sm_90"].shared_memory


def test_a_misaligned_view_has_narrower_loads(toy):
    assert "128" not in toy[1]["resources"]["loads"]
    assert "128" in toy[1]["resources"]["stores"]


def test_resources_are_read_from_amd_machine_code():
    aligned, shifted = in_subprocess("compile_toy", "gfx942")
    used = aligned["resources"]
    assert 0 < used["registers"] <= 512
    assert used["spilled"] == 0
    assert used["matrix"] and all(kind.startswith("v_mfma_") and kind.endswith("bf16") for kind in used["matrix"])
    assert used["loads"]["128"] > 0 and "128" not in shifted["resources"]["loads"]
    assert 0 < aligned["shared"] <= 65_536


def test_amd_assembly_is_parsed():
    used = machine_code.read_amdgcn("""
\tbuffer_load_dwordx4 v[10:13], v6, s[4:7], 0 offen
\tglobal_load_lds_dwordx4 v[0:1], off
\tbuffer_load_ushort v1, v2, s[4:7], 0 offen
\tglobal_load_short_d16_hi v1, v[2:3], off
\tbuffer_store_dwordx2 v[0:1], v2, s[8:11], 0 offen
\tglobal_store_byte v[0:1], v2, off
\tscratch_load_dword v1, off, off offset:4
\tds_read_b128 v[0:3], v4
\ts_load_dwordx4 s[0:3], s[4:5], 0x0
\tv_mfma_f32_16x16x16_f16 a[0:3], v[0:1], v[2:3], a[0:3]
    .private_segment_fixed_size: 8
  - .agpr_count:     4
    .vgpr_count:     76
    .vgpr_spill_count: 2
""")
    assert used == machine_code.Resources(76, 8, {"v_mfma_f32_16x16x16_f16": 1}, {16: 2, 128: 2}, {8: 1, 64: 1})


def test_a_public_call_is_compiled():
    """At head width 64, the forward kernels use matrix instructions and 128-bit accesses, and do not spill registers."""
    launches = in_subprocess("compile_performer", "sm_90")
    # The batch and the number of heads are too small to fill the GPU, so the tokens are split.
    assert [each["kernel"] for each in launches] == [
        "aggregate_forward_kernel",
        "merge_softmax_kernel",
        "broadcast_forward_kernel",
    ]
    for each in launches[::2]:
        used = each["resources"]
        assert used["spilled"] == 0
        assert "HGMMA" in used["matrix"]
        assert "128" in used["loads"] and "128" in used["stores"]


def test_torch_launches_are_counted():
    x = torch.empty(4, 6, dtype=torch.bfloat16, device="meta")
    with torch.autograd.profiler.profile() as profile:
        x.transpose(0, 1).contiguous().view(4, 6).float().sum(-1, keepdim=True) + torch.zeros(4, 1, device="meta")
        x.contiguous().to(torch.bfloat16).reshape(24)
    roots = [event for event in profile.function_events if event.cpu_parent is None]
    assert sum(map(compile_report.torch_launches, roots)) == 5  # contiguous, float, sum, zeros and add launch once each


@pytest.mark.parametrize("arch", TARGETS)
def test_every_launch_fits_its_shared_memory(arch):
    """Cover every entry that the launch table can return. The committed table must match the current tiles and kernels."""
    rows = read_csv(shared_memory.COMMITTED, shared_memory.Row)
    served = shared_memory.entries(arch)
    assert {(entry.bits, entry.width) for entry in served} == set(product((16, 32), (16, 32, 64, 128, 256)))
    missing = shared_memory.missing(rows, arch)
    assert not missing, (
        f"{len(missing)} entries are not measured, such as {missing[0]}: run `vix dev compile-report --shared --write`"
    )
    assert shared_memory.excesses(rows, arch) == []


def test_missing_and_excessive_shared_memory_is_named(monkeypatch):
    tile = find_tile("sm_86", "aggregate_slots", 16, 128, False)[1]
    names = "3.9.0", "sm_86", "aggregate_slots", 16, 128, " ".join(map(str, tile)), sources.code_hash("aggregate_slots")
    row = shared_memory.Row(*names, 101_377)
    entry = row.entry
    assert entry not in shared_memory.missing([row], "sm_86")
    (found,) = shared_memory.excesses([row], "sm_86")
    assert found.startswith("aggregate_slots 16 bits width 128") and found.endswith("sm_86 has 101376")
    assert shared_memory.excesses([replace(row, shared=101_376)], "sm_86") == []
    assert shared_memory.excesses([row], "sm_80") == []  # sm_80 has more memory and different tiles
    for stale in (replace(row, source="another"), replace(row, tile="64 64 4 1 tf32x3 False")):
        assert entry in shared_memory.missing([stale], "sm_86") and shared_memory.excesses([stale], "sm_86") == []
    assert entry in shared_memory.missing(
        [row, replace(row, triton="3.6.0", kernel="rotate")], "sm_86"
    )  # the table needs a row for each Triton version
    monkeypatch.setitem(OVERRIDES["sm_86"], ("aggregate_slots", 16, 128), tile._replace(num_stages=4))
    assert entry not in shared_memory.entries("sm_86")


def test_shared_memory_equals_that_of_a_full_compilation():
    """Stopping the compilation after allocation does not change the measured shared memory."""
    (stopped, complete) = in_subprocess("shared_both_ways", "sm_86")
    assert stopped == complete > 0


def test_equal_rows_are_no_regression():
    assert regressions([SM90_16_BIT], [SM90_16_BIT]) == []
    assert violations([SM90_16_BIT]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spilled": 8}, "spills 8 bytes"),
        ({"matrix": "HMMA:64"}, "multiplies by HMMA, was HGMMA"),
        ({"matrix": "HGMMA:8 HMMA:32"}, "multiplies by HGMMA HMMA, was HGMMA"),
        ({"matrix": ""}, "multiplies by no matrix instruction, was HGMMA"),
        ({"loads": "16:96 32:2 128:2"}, "of its loads are in 128-bit accesses, was"),
        ({"stores": "16:32"}, "0% of the bytes of its stores are in 128-bit accesses, was 100%"),
    ],
)
def test_each_regression_is_named_once(change, message):
    (found,) = regressions([replace(SM90_16_BIT, **change)], [SM90_16_BIT])
    assert message in found
    assert found.startswith("broadcast_kernel sm_90 bf16 width 64 (N:64; performer forward 16,110")


def test_improvements_are_no_regression():
    old = replace(SM90_16_BIT, spilled=8, matrix="HMMA:64 HMMA.TF32:8", loads="16:96", stores="64:2")
    assert regressions([SM90_16_BIT], [old]) == []


def test_rows_are_compared_by_use_not_by_configuration():
    slower = replace(SM90_16_BIT, blocks="N:32", matrix="HMMA:64", uses="performer forward 110")
    others = replace(SM90_16_BIT, uses="performer forward 16; performer+rope forward 16")
    assert len(regressions([slower, others], [SM90_16_BIT])) == 1
    assert regressions([replace(slower, triton="3.6.0")], [SM90_16_BIT]) == []
    assert regressions([replace(slower, width=32)], [SM90_16_BIT]) == []


def test_new_and_vanished_uses_are_named():
    renamed = regressions([replace(SM90_16_BIT, kernel="spread_kernel", spilled=8)], [SM90_16_BIT])
    where = "sm_90 bf16 width 64, 16 slots"
    assert renamed == [
        f"performer forward no longer launches broadcast_kernel: {where} and 1 more",
        f"performer+rope forward no longer launches broadcast_kernel: {where}",
        f"performer forward launches, new to the table, spread_kernel: {where} and 1 more",
        f"performer+rope forward launches, new to the table, spread_kernel: {where}",
    ]
    fewer = replace(SM90_16_BIT, uses="performer forward 16; performer+rope forward 16")
    vanished = "performer forward no longer launches broadcast_kernel: sm_90 bf16 width 64, 110 slots"
    assert regressions([fewer], [SM90_16_BIT]) == [vanished]
    assert regressions([fewer], [SM90_16_BIT], complete=False) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spilled": 4}, "spills 4 bytes per thread, 0 allowed"),
        ({"arch": "gfx942", "shared": 65_537}, "65537 bytes of shared memory, gfx942 has 65536"),
        ({"width": 256, "spilled": 68}, "spills 68 bytes per thread, 64 allowed"),
        ({"arch": "sm_86", "shared": 101_377}, "101377 bytes of shared memory, sm_86 has 101376"),
        ({"arch": "sm_100", "tensor_memory": 640}, "640 columns of tensor memory"),
    ],
)
def test_exceeded_limits_are_named(change, message):
    (found,) = violations([replace(SM90_16_BIT, **change)])
    assert message in found


def test_values_within_limits_pass():
    assert violations([replace(SM90_16_BIT, width=256, spilled=64), replace(SM90_16_BIT, shared=101_377)]) == []


def test_amd_regressions_are_named():
    assert violations([GFX942]) == []
    assert regressions([replace(GFX942, spilled=48)], [GFX942]) == []
    (found,) = regressions([replace(GFX942, spilled=56)], [GFX942])
    assert found.endswith("spills 56 bytes, was 52")
    (found,) = regressions([replace(GFX942, matrix="v_mfma_f32_32x32x2_f32:160")], [GFX942])
    assert found.endswith("multiplies by v_mfma_f32_32x32x2_f32, was v_mfma_f32_32x32x8_bf16")


@pytest.mark.parametrize(
    ("arch", "kernel", "percent"),
    [
        ("sm_80", (4, 32, 0), 100),  # 16 blocks of four warps fit
        ("sm_90", (4, 168, 40_960), 18),  # three warps fit in each quarter of the register file
        ("sm_90", (4, 169, 40_960), 12),  # registers are allocated in groups of eight
        ("sm_86", (4, 64, 50_176), 16),  # with the reserved KiB, this is exactly half of the shared memory
        ("sm_86", (4, 64, 50_177), 8),
        ("sm_86", (1, 32, 0), 33),  # at most 16 blocks fit
        ("sm_100", (8, 32, 0, 256), 25),  # two blocks share the tensor memory
        ("gfx942", (4, 129, 0), 37),  # three wavefronts fit on each SIMD
        ("gfx942", (8, 256, 16_384), 25),
        ("gfx942", (4, 64, 16_384), 50),  # four workgroups fit
        ("gfx950", (4, 64, 16_384), 100),  # eight workgroups fit in the registers, and nine in the LDS
    ],
)
def test_occupancy_of_a_kernel(arch, kernel, percent):
    assert TARGETS[arch].occupancy(*kernel) == percent


def test_the_committed_table_is_complete_and_current():
    """If a kernel or a tile has changed since the table was written, run `make report ARGS=--write`."""
    rows = read_csv(compile_report.TABLE, Row)
    assert violations(rows) == [] and outdated(rows) == []
    newest, oldest = {row.triton for row in rows} - {"3.6.0"}, "3.6.0"
    grid = set(product(compile_report.ARCHITECTURES, compile_report.DTYPES, compile_report.WIDTHS))
    assert {row.cell for row in rows} == {
        *((*newest, *cell) for cell in grid),
        *((oldest, *cell) for cell in grid if cell[0] == "sm_90"),
    }


def test_rows_of_a_changed_kernel_or_tile_are_outdated(monkeypatch):
    row = replace(SM90_16_BIT, kernel="broadcast_slots_kernel", source=sources.source_hash("broadcast_slots_kernel", "sm_90"))
    assert outdated([row]) == [] and outdated([replace(row, arch="sm_80")]) == ["broadcast_slots_kernel sm_80"]  # tiles differ
    functions = {name: [*words] for name, words in sources.device_code().items()}
    assert '"""' not in "".join(functions["broadcast_slots_kernel"])
    assert "LOG2E" in functions and "LOG2E" in functions["broadcast_slots_kernel"]
    functions["exps_below"].append("pass")  # the kernel calls this function
    monkeypatch.setattr(sources, "device_code", lambda: functions)
    sources.code_hash.cache_clear()
    sources.source_hash.cache_clear()
    try:
        assert outdated([row]) == ["broadcast_slots_kernel sm_90"]
    finally:
        sources.code_hash.cache_clear()
        sources.source_hash.cache_clear()


def test_tables_are_sorted_and_stable(tmp_path):
    rows = [replace(SM90_16_BIT, arch=arch, dtype=dtype) for arch in ("sm_100", "sm_80") for dtype in ("fp32", "fp16")]
    write_table(tmp_path / "a.csv", rows)
    read = read_csv(tmp_path / "a.csv", Row)
    write_table(tmp_path / "b.csv", reversed(read))
    assert [(row.arch, row.dtype) for row in read] == [
        ("sm_80", "fp16"), ("sm_80", "fp32"), ("sm_100", "fp16"), ("sm_100", "fp32"),
    ]  # fmt: skip
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()


def test_an_invalid_row_keeps_the_old_table(tmp_path):
    write_table(tmp_path / "a.csv", [SM90_16_BIT])
    before = (tmp_path / "a.csv").read_text()
    with pytest.raises(ValueError):
        write_table(tmp_path / "a.csv", [replace(SM90_16_BIT, dtype="fp8")])
    assert (tmp_path / "a.csv").read_text() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.csv"]


def test_a_damaged_table_is_refused(tmp_path, capsys):
    for text in ("", "a,b\n1,2\n"):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(SystemExit) as exit:
            compile_report.main(["--csv", str(tmp_path / "a.csv")])
        assert exit.value.code == 2
        assert "is not a table of this report" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arch", "sm_42"], "invalid choice: 'sm_42'"),
        (["--width", "300"], "expected an integer from 8 to 256, got '300'"),
        (["--jobs", "0"], "expected an integer from 1"),
        (["--csv", "missing.csv"], "there is no file missing.csv"),
        (["--write", "--op", "linear_attention"], "argument --op: cannot be combined with --write"),
    ],
)
def test_invalid_arguments_give_a_one_line_error(argv, message, capsys):
    with pytest.raises(SystemExit) as exit:
        compile_report.main(argv)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_unknown_targets_are_refused():
    with pytest.raises(ValueError, match=r"target: expected one of sm_80.*got 'sm_42'"), offline.target("sm_42"):
        pass


def test_a_failure_restores_launches():
    with pytest.raises(KeyError), offline.target("sm_90"):
        assert conditions.current.observer is not None
        raise KeyError
    assert conditions.current.observer is None


if __name__ == "__main__":
    found = globals()[sys.argv[1]](sys.argv[2])
    print(json.dumps([each if isinstance(each, int) else asdict(each) for each in found], default=str))
