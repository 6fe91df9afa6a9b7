"""Tests of `vix dev compile-report`, which reads the machine code of the kernels and detects regressions.

The tests need neither a GPU nor Triton's interpreter.
"""

from __future__ import annotations

import json
import re
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
from vix_kernels._triton import launch_table
from vix_kernels._triton.launch import find_tile, launch
from vix_kernels._triton.targets import TARGETS
from vix_kernels.commands import read_csv
from vix_kernels.measure import budgets, compile_cell, compile_report, machine_code, observed, offline, shared_memory, sources
from vix_kernels.measure.compile_table import Row, outdated, write_table

SECTIONS = "100 40 20 2 0 16 16 1; 200 60 40 32 4096 64 16 cdiv(M,64)"
SM90_16_BIT = Row(
    triton="3.9.0", arch="sm_90", dtype="bf16", width=64, kernel="broadcast_forward_kernel", blocks="N:64", warps=4,
    stages=2, registers=168, spilled=0, shared=40960, tensor_memory=0, programs=3, unit="logit", loop=8.5, whole=9.0, exps=1.0,
    waits=2, products=2, multiply_adds=128.0, cycles="issue:62.5 exp:62.5", bound="issue", matrix="HGMMA.64x64x16:16",
    loads="32:2 128:12", stores="128:4", uses="performer forward 16,256; performer+rope forward 16", sections=SECTIONS,
)  # fmt: skip


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
    """Launch the toy kernel on aligned tensors with N = 1024 and N = 63 rows, and on a view offset by one element.

    Return the compiled launches.
    """
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
    """Compile the toy kernel twice: up to the allocation of shared memory, and completely.

    Return both shared memory sizes in bytes.
    """
    x = torch.empty(1024, 64, dtype=torch.bfloat16, device="meta")
    meta = {"D": 64, "BLOCK": 64, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    arguments = x, x, x, x.stride(0), 1024
    with offline.capture(target):
        with shared_memory.allocation_only(), pytest.raises(shared_memory.Allocated) as stopped:
            attention_kernel.warmup(*arguments, grid=(16,), **meta)
        complete = attention_kernel.warmup(*arguments, grid=(16,), **meta)
    return [stopped.value.args[0], complete.metadata.shared]


def in_subprocess(function: str, target: str) -> list[dict]:
    """Run a function from this file in a process without Triton's interpreter, and return the result."""
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
    assert {kind.partition(".")[0] for kind in used["matrix"]} == {"HGMMA"}
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
    """On sm_90, the aggregate and broadcast kernels of Performer spill no registers.

    They use matrix instructions and 128-bit accesses.
    """
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
        assert any(kind.startswith("HGMMA.64x") for kind in used["matrix"])
        assert "128" in used["loads"] and "128" in used["stores"]


def test_torch_launches_are_counted():
    x = torch.empty(4, 6, dtype=torch.bfloat16, device="meta")
    with observed.OnMeta() as torch_kernels:
        x.transpose(0, 1).contiguous().view(4, 6).float().sum(-1, keepdim=True) + torch.zeros(4, 1, device="meta")
        x.contiguous().to(torch.bfloat16).reshape(24)
    assert torch_kernels.launches == 5  # contiguous, float, sum, zeros and add launch one kernel each


@pytest.mark.parametrize("arch", TARGETS)
def test_every_launch_fits_its_shared_memory(arch):
    """For sm_90, check every entry of the launch table. For other GPUs, check only entries with an up-to-date measurement."""
    rows = read_csv(shared_memory.COMMITTED, shared_memory.Row)
    served = shared_memory.entries(arch)
    assert {(entry.bits, entry.width) for entry in served} == set(product((16, 32), (16, 32, 64, 128, 256)))
    missing = shared_memory.missing(rows, arch)
    assert arch != "sm_90" or not missing, (
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
    monkeypatch.setitem(launch_table.OVERRIDES["sm_86"], ("aggregate_slots", 16, 128), tile._replace(num_stages=4))
    assert entry not in shared_memory.entries("sm_86")


def test_shared_memory_equals_that_of_a_full_compilation():
    """Stopping the compilation once shared memory is allocated does not change the measured size."""
    (stopped, complete) = in_subprocess("shared_both_ways", "sm_86")
    assert stopped == complete > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spilled": 4}, "spills 4 bytes per thread, 0 allowed"),
        ({"arch": "gfx942", "shared": 65_537}, "65537 bytes of shared memory, gfx942 has 65536"),
        ({"width": 256, "spilled": 548}, "spills 548 bytes per thread, 544 allowed"),
        ({"arch": "sm_86", "shared": 101_377}, "101377 bytes of shared memory, sm_86 has 101376"),
        ({"arch": "sm_100", "tensor_memory": 640}, "640 columns of tensor memory"),
        ({"waits": 4}, "waits 4 times for 2 matrix products, 3 allowed"),
        ({"exps": 1.2}, "computes 1.2 exponentials per logit, 1.15 allowed"),
        ({"matrix": "HGMMA.64x64x16:16 HMMA.16816:8"}, "expected warp-group products (HGMMA) only"),
        ({"matrix": ""}, "expected warp-group products (HGMMA) only, got none"),
        ({"loads": "16:96 64:2"}, "expected 128-bit loads and stores"),
        ({"stores": "16:32"}, "expected 128-bit loads and stores"),
    ],
)
def test_exceeded_limits_are_named(change, message):
    (found,) = budgets.violations([replace(SM90_16_BIT, **change)])
    assert found.startswith("broadcast_forward_kernel ") and message in found


def test_values_within_limits_pass():
    wide = replace(SM90_16_BIT, width=256, spilled=64)
    assert budgets.violations([SM90_16_BIT, wide, replace(SM90_16_BIT, shared=101_377, waits=3, exps=1.15)]) == []
    # On AMD, spills and machine code are not checked.
    assert budgets.violations([replace(SM90_16_BIT, arch="gfx942", spilled=52, exps=2.0, matrix="", loads="")]) == []


def test_a_declared_exception_applies_only_where_it_is_declared(monkeypatch):
    row = replace(SM90_16_BIT, spilled=8)
    assert len(budgets.violations([row])) == 1
    where = dict(archs=("sm_90",), dtypes=("bf16",), widths=(64,), use="+rope")
    monkeypatch.setattr(budgets, "SPILLS", (budgets.Declared("broadcast_forward", 8, "a reason", **where),))
    assert budgets.violations([row]) == []
    changes = dict(arch="sm_80"), dict(dtype="fp16"), dict(width=32), dict(spilled=16), dict(uses="performer forward 16")
    for change in (*changes, dict(kernel="aggregate_forward_kernel")):
        assert len(budgets.violations([replace(row, **change)])) == 1, change


@pytest.mark.parametrize(
    ("use", "matches"),
    [
        ("", True),
        ("performer", True),
        ("mask", True),
        ("+mask", True),
        ("performer+mask backward 110", True),
        ("feature backward", True),
        ("perform", False),
        ("performer forward", False),
        ("performer backward 11", False),
        ("feature+mask", False),  # the words must be those of one call
    ],
)
def test_an_exception_for_a_call_matches_whole_words(use, matches):
    row = replace(SM90_16_BIT, uses="performer+mask+rope backward 16,110; feature backward 32")
    assert budgets.Declared("broadcast_forward", 8, "a reason", use).matches(row) is matches


def test_every_exception_is_needed():
    rows = read_csv(compile_report.TABLE, Row)
    spilling, duplicating = [row for row in rows if row.spilled], [row for row in rows if row.exps > 1.15]
    for exceptions, exceeding in ((budgets.SPILLS, spilling), (budgets.DUPLICATED, duplicating), (budgets.NARROW, rows)):
        for each in exceptions:
            assert any(each.matches(row) for row in exceeding), each


def test_overlapping_entries_of_the_launch_table_are_refused():
    tile = launch_table.Tile(16, 16, 4, 1)
    with pytest.raises(ValueError, match="rope, 16 bits: expected one entry for width 64, got several"):
        launch_table._entries({("rope", 16, 32, 64): tile, ("rope", 16, 64): tile})


def test_every_exception_has_a_reason():
    for name in ("SPILLS", "SERIALIZED", "DUPLICATED", "SINGLE_WARP", "NARROW"):
        assert all(each.reason and each.limit > 0 for each in getattr(budgets, name))
    for each in budgets.BUDGETS:
        assert each.reached is None or (each.reason and each.exceeds(each.reached, each.most)), each.name


def test_missed_budgets_are_named():
    most = budgets.Budget("broadcast", ("broadcast_",), "performer forward", 64, 256, most=8.0)
    assert budgets.missed([replace(SM90_16_BIT, loop=8.0)], [most]) == ([], [])
    declared, failed = budgets.missed([SM90_16_BIT], [most])
    assert declared == [] and failed == ["broadcast, width 64, Triton 3.9.0: 8.5, budget 8"]
    reached = replace(most, reached=8.5, reason="a reason")
    assert budgets.missed([SM90_16_BIT], [reached]) == (["broadcast, width 64, Triton 3.9.0: 8.5, budget 8: a reason"], [])
    (found,) = budgets.missed([replace(SM90_16_BIT, loop=8.6)], [reached])[1]
    assert found.endswith("8.6, budget 8, at most 8.5 declared")
    for change in (dict(width=32), dict(uses="performer forward 16"), dict(dtype="fp16"), dict(arch="sm_80")):
        assert budgets.missed([replace(SM90_16_BIT, **change)], [most]) == ([], [])  # the budget does not apply to these rows


def test_late_calls_are_named():
    assert budgets.late({"forward, case A": 79e-6, "backward, case A": 200e-6}) == ([], [])
    assert budgets.late({"forward, case A": 81e-6}) == ([], ["forward, case A: 81 us predicted, budget 80"])
    (declared,), failed = budgets.late({"pinv, 512 heads, fp32": float("inf")})
    assert declared.endswith("its predicted time is infinite") and failed == []
    assert budgets.late({"pinv, 512 heads, fp32": 201e-6})[1]  # only an infinite time is allowed


def test_a_budget_adds_kernels_but_not_specializations():
    other = replace(SM90_16_BIT, kernel="broadcast_tail_kernel", loop=1.0)
    again = replace(SM90_16_BIT, loop=2.0)
    most = budgets.Budget("broadcast", ("broadcast_",), "performer forward", 64, 256, most=8.0)
    assert most.value([SM90_16_BIT, again, other]) == 9.5
    assert replace(most, column="warps").value([SM90_16_BIT, replace(other, programs=1)]) == 4
    rotated = replace(other, kernel=SM90_16_BIT.kernel, loop=17.0, uses="performer+rope forward 256")
    ratio = replace(most, use="performer+rope forward", against="performer forward")
    assert ratio.value([SM90_16_BIT, rotated]) == 2.0 and ratio.value([SM90_16_BIT]) is None
    exact = replace(most, dtype="fp32")
    assert (
        exact.value([SM90_16_BIT, replace(SM90_16_BIT, dtype="fp32", loop=34.0)]) == 4.0 and exact.value([SM90_16_BIT]) is None
    )


@pytest.mark.parametrize(
    ("arch", "kernel", "percent"),
    [
        ("sm_80", (4, 32, 0), 100),  # 16 blocks of four warps fit
        ("sm_90", (4, 168, 40_960), 18),  # three warps fit in each quarter of the register file
        ("sm_90", (4, 169, 40_960), 12),  # registers are allocated in groups of eight
        ("sm_86", (4, 64, 50_176), 16),  # with the 1 KiB that CUDA reserves per block, this is exactly half of the memory
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


def test_the_committed_table_is_current_and_passes():
    """If a kernel has changed since the table was written, run `make report ARGS=--write`."""
    rows = read_csv(compile_report.TABLE, Row)
    assert rows and outdated(rows) == []
    assert budgets.violations(rows) == [] and budgets.missed(rows, budgets.BUDGETS)[1] == []
    assert len({(row.cell, row.key) for row in rows}) == len(rows)
    for row in filter(budgets.is_pass, rows):
        if row.arch.startswith("sm_") and row.matrix:
            assert row.unit and all("?" not in part.trips for part in row.parts), f"{row}: the main loops were not recognized"


def test_every_budget_has_rows():
    """A budget without rows, for example because its kernel was renamed, would never be checked."""
    rows = read_csv(compile_report.TABLE, Row)
    for version, budget in product({row.triton for row in rows}, budgets.BUDGETS):
        if budget.dtype == "bf16":
            assert budget.value(row for row in rows if row.triton == version) is not None, f"{budget.name}, Triton {version}"
            names = {row.kernel for row in rows if row.triton == version}
            assert all(any(name.startswith(prefix) for name in names) for prefix in budget.kernels), budget.name


def test_rows_of_a_changed_kernel_are_outdated(monkeypatch):
    row = replace(SM90_16_BIT, kernel="broadcast_slots_kernel", source=sources.hash_of("broadcast_slots_kernel"))
    assert outdated([row]) == []
    assert outdated([replace(row, kernel="vanished_kernel")]) == ["vanished_kernel sm_90"]
    functions = {name: [*words] for name, words in sources.device_code().items()}
    assert '"""' not in "".join(functions["broadcast_slots_kernel"])
    assert "LN2" in functions and "LN2" in functions["broadcast_slots_kernel"]
    assert "9" in functions["BACKWARD"]  # assigned together with FORWARD
    functions["exps_at_most_one"].append("pass")  # the kernel calls this function through another function
    monkeypatch.setattr(sources, "device_code", lambda: functions)
    sources.hash_of.cache_clear()
    try:
        assert outdated([row]) == ["broadcast_slots_kernel sm_90"]
    finally:
        sources.hash_of.cache_clear()


def test_the_grid_has_all_cells_of_two_architectures():
    full = compile_report.grid("sm_90", oldest=False)
    assert len(full) == 3 * 8 and ("sm_90", "fp32", 112) in full and ("sm_90", "fp16", 16) in full
    assert compile_report.grid("sm_100", oldest=False) == [("sm_100", "bf16", width) for width in (32, 64, 128)]
    assert compile_report.grid("sm_90", oldest=True) == [("sm_90", "bf16", width) for width in (32, 64, 128)]
    assert compile_report.grid("sm_86", oldest=True) == []


def test_the_sample_is_stable():
    rows = [replace(SM90_16_BIT, key=f"{at:012}") for at in range(20)]
    chosen = compile_report.sample(rows, 8)
    assert chosen == compile_report.sample(rows[::-1], 8) and len(set(chosen)) == 8


def test_an_interrupted_run_keeps_finished_cells(monkeypatch, tmp_path):
    """--write replaces the rows of finished cells and drops the rows of changed kernels. It keeps all other rows.

    A cell is a combination of architecture, dtype and head width.
    """
    source = sources.hash_of(SM90_16_BIT.kernel)
    old = [replace(SM90_16_BIT, dtype=dtype, source=source, key=dtype) for dtype in ("fp16", "bf16")]
    outdated_row = replace(SM90_16_BIT, arch="sm_80", source="another", key="outdated")
    write_table(tmp_path / "a.csv", [*old, outdated_row])
    new = replace(old[1], key="new", registers=100)

    def interrupted(jobs, function, cells):
        assert function is compile_cell.run_cell and [cell[:3] for cell in cells] == [("sm_90", "bf16", 64)]
        yield compile_cell.Report(("sm_90", "bf16", 64), [new], compiled=1)
        raise KeyboardInterrupt

    monkeypatch.setattr(compile_report, "by_workers", interrupted)
    arguments = ["--csv", str(tmp_path / "a.csv"), "--arch", "sm_90", "--dtype", "bf16", "--width", "64"]
    with pytest.raises(KeyboardInterrupt):
        compile_report.main([*arguments, "--write"])
    assert read_csv(tmp_path / "a.csv", Row) == [old[0], new]


def test_rows_that_differ_from_the_table_are_failures(monkeypatch, tmp_path, capsys):
    row = replace(SM90_16_BIT, triton=triton.__version__, source=sources.hash_of(SM90_16_BIT.kernel), key="key")
    write_table(tmp_path / "a.csv", [row])

    def compiled_again(jobs, function, cells):
        assert cells[0][-1] == ["key"]
        yield compile_cell.Report(("sm_90", "bf16", 64), [row], compiled=1, changed=["it differs from the table"])

    monkeypatch.setattr(compile_report, "by_workers", compiled_again)
    arguments = ["--csv", str(tmp_path / "a.csv"), "--arch", "sm_90", "--dtype", "bf16", "--width", "64", "--sample", "8"]
    monkeypatch.setattr(compile_report, "BUDGETS", ())
    assert compile_report.main(arguments) == 1
    assert "FAILED it differs from the table" in capsys.readouterr().err


def test_missing_rows_are_counted_without_compiling():
    command = [sys.executable, "-m", "vix_kernels", "dev", "compile-report", "--missing", "--arch", "sm_120", "--width", "48"]
    with compile_report.worker_environment():
        done = subprocess.run([*command, "--op", "apply_rope"], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert re.search(r"^(\d+) rows are missing: sm_120 bf16 48\n\1 of \1 rows are missing", done.stdout)


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
