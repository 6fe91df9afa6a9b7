"""Tests of the instruction counts in the compile report, and of the predictions based on them. The tests need no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the compile report compiles with Triton, which is not installed here")

from vix_kernels.__main__ import main
from vix_kernels.measure import compile_cell, compile_report, flash, launch_times, observed, ttgir
from vix_kernels.measure.counting import PIPES, Counts, Section, align, loops, multiply_adds
from vix_kernels.measure.machine_code import parse
from vix_kernels.measure.roofline import GPUS, LAUNCH
from vix_kernels.testing import SPECS, Case

H100 = next(gpu for gpu in GPUS if gpu.name == "H100")


def flash_rows() -> list[dict]:
    """Compile the flash-attention kernel without and with a causal mask. Return both rows of the compile report as dicts."""
    found = []
    for causal in (False, True):
        with observed.observed("sm_90") as launches:
            flash.flash_forward(*(torch.empty(2, 4, 1024, 64, dtype=torch.float16, device="meta") for _ in range(3)), causal)
        errors: list[str] = []
        (row,) = compile_cell.compile_launches("sm_90", launches, errors)
        found.append(
            asdict(row) | dict(whole=compile_cell.whole(row, launches), work=compile_cell.work(row.parts, launches[0]))
        )
    return found


def keys() -> list[list[str]]:
    """Return the keys (`Launch.key`) of all launches in each of three calls, without compiling the kernels.

    The second call has a different number of tokens than the first, and the third has a different head width.
    """
    found = []
    for tokens, width in ((1024, 64), (777, 64), (1024, 32)):
        case = Case("", batch=2, heads=4, tokens=tokens, width=width, features=16)
        directions = observed.observe_call(SPECS["performer_attention"], case, torch.bfloat16, "sm_90")
        found.append([launch.key for _, launches, _ in directions for launch in launches])
    return found


def factors() -> list[float]:
    return [each.factor for each in flash.calibrate()]


def in_subprocess(function: str) -> list:
    """Run a function from this file in a process without Triton's interpreter, and return the result."""
    with compile_report.worker_environment():
        command = [sys.executable, __file__, function]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_lengths_do_not_change_the_key_but_widths_do():
    first, second, third = in_subprocess("keys")
    assert len(first) > 3 and first == second and not set(first) & set(third)


def test_the_instructions_of_a_known_kernel_are_counted():
    full, causal = in_subprocess("flash_rows")
    for row, main_loops in ((full, 1), (causal, 2)):
        assert row["unit"] == "logit" and row["products"] == 2 * main_loops and row["waits"] <= row["products"] + 1
        assert row["multiply_adds"] == 2 * 64 * main_loops
        assert main_loops <= row["exps"] <= 1.1 * main_loops  # includes the factors that rescale the sums
        assert 8 * main_loops < row["loop"] < 24 * main_loops
        assert all(kind.startswith("HGMMA.64x64x16:") for kind in row["matrix"].split())
    assert [Section.parse(each).trips for each in full["sections"].split("; ")] == ["1", "cdiv(N,64)"]
    # Each program has 128 queries. With a causal mask, it skips the tiles above the diagonal, but computes the tiles on the
    # diagonal completely.
    logits = 2 * 4 * 1024 * 1024
    assert full["loop"] < 32 * full["warps"] * full["work"][0] / logits < 1.5 * full["loop"]
    tensor = PIPES.index("tensor")
    assert full["work"][tensor] * full["warps"] == 128 * logits
    assert causal["work"][tensor] * causal["warps"] == 128 * logits * (1024 + 128) / 2 / 1024


def test_the_flash_kernel_is_correct():
    q, k, v = torch.randn(3, 1, 2, 256, 64, generator=torch.Generator().manual_seed(0)).to(torch.float16).unbind()
    for causal in (False, True):
        expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
        error = (flash.flash_forward(q, k, v, causal) - expected).abs().max()
        assert error < 2e-3


def test_the_declared_error_of_predictions_is_the_measured_one():
    found = in_subprocess("factors")
    low, high = flash.FACTOR
    assert low <= min(found) < low + 0.1 and high - 0.1 < max(found) <= high


TTGIR = """
  tt.func public @kernel(%x: !tt.ptr<bf16> {tt.divisibility = 16 : i32}, %N: i32, %chunk: i32) attributes {noinline = false} {
    %c64_i32 = arith.constant 64 : i32 loc(#loc1)
    %c4_i32 = arith.constant 4 : i32 loc(#loc1)
    %c0_i32 = arith.constant 0 : i32 loc(#loc1)
    %zero = arith.constant dense<0.0> : tensor<64x32xf32, #mma> loc(#loc1)
    %pid = tt.get_program_id x : i32 loc(#loc1)
    %first = arith.muli %pid, %chunk : i32 loc(#loc1)
    %end = arith.addi %first, %chunk : i32 loc(#loc1)
    %last = arith.minsi %end, %N : i32 loc(#loc1)
    %a = tt.load %x : tensor<64x16x!tt.ptr<bf16>, #blocked> loc(#loc1)
    %b = tt.load %x : tensor<16x32x!tt.ptr<bf16>, #blocked> loc(#loc1)
    %out:2 = scf.for %i = %first to %last step %c64_i32 iter_args(%max = %zero, %acc = %zero) -> (tensor<64x32xf32>) : i32 {
      %high = tt.dot %a, %b, %zero : tensor<64x16xbf16, #a> * tensor<16x32xbf16, #b> -> tensor<64x32xf32, #mma> loc(#loc2)
      %both = tt.dot %a, %b, %high : tensor<64x16xbf16, #a> * tensor<16x32xbf16, #b> -> tensor<64x32xf32, #mma> loc(#loc2)
      %less = arith.subf %both, %max : tensor<64x32xf32, #mma> loc(#loc2)
      %p = math.exp2 %less : tensor<64x32xf32, #mma> loc(#loc2)
      %again = math.exp2 %less : tensor<64x32xf32, #blocked> loc(#loc2)
      %pv = tt.dot %p, %b, %acc : tensor<64x32xbf16, #a> * tensor<32x32xbf16, #b> -> tensor<64x32xf32, #mma> loc(#loc2)
      scf.for %j = %c0_i32 to %c4_i32 step %c4_i32 : i32 {
        %d = tt.dot %a, %b, %zero : tensor<64x16xbf16, #a> * tensor<16x32xbf16, #b> -> tensor<64x32xf32, #mma> loc(#loc2)
      } loc(#loc3)
      scf.yield %both, %pv : tensor<64x32xf32, #mma>, tensor<64x32xf32, #mma> loc(#loc3)
    } loc(#loc3)
    tt.return loc(#loc3)
  } loc(#loc3)
"""


def test_loops_are_read_from_ttgir():
    (loop,) = ttgir.read(TTGIR).children
    assert ttgir.evaluate(loop.trips, dict(pid_x=1, chunk=256, N=1000)) == 4
    assert ttgir.evaluate(loop.trips, dict(pid_x=3, chunk=256, N=1000)) == 4  # the last 232 tokens
    # Two products that are added count as one tile of logits, even if its exponentials are computed twice.
    assert loop.logits == 64 * 32 and loop.products == 3
    assert loop.multiply_adds == 2 * 64 * 32 * 16 + 64 * 32 * 32
    (inner,) = loop.children
    assert inner.constant and inner.trips == "1" and inner.values == 64 * 32
    whole = loop.unrolled([])
    assert whole.products == 4 and not whole.children and loop.products == 3


SASS = """
        /*0000*/                   MOV R1, R2 ;
        /*0010*/              @!P1 BRA 0x90 ;
        /*0020*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/                   MUFU.EX2 R3, R3 ;
        /*0040*/               @P0 BRA 0x80 ;
        /*0050*/              @!PT LDS RZ, [RZ] ;
        /*0060*/               @P2 BRA 0x20 ;
        /*0070*/                   EXIT ;
        /*0080*/                   BRA 0x70 ;
        /*0090*/                   BRA 0x70 ;
        /*00a0*/                   NOP ;
        /*00b0*/                   BRA 0xb0 ;
"""


def code() -> list:
    lines = [line.split(maxsplit=2) for line in SASS.splitlines() if line]
    words = [
        (line[0].strip("/*"), line[1], line[2]) if line[1][0] == "@" else (line[0].strip("/*"), "", " ".join(line[1:]))
        for line in lines
    ]
    return [parse(address, guard, *text.rstrip(" ;").partition(" ")[::2]) for address, guard, text in words]


def test_loops_are_found_in_machine_code():
    """A branch back to EXIT from later code is not a loop. Unreachable code is ignored."""
    program = loops(code())
    (loop,) = program.children
    assert [each.kind for each in loop.code] == ["HGMMA", "MUFU", "BRA", "LDS", "BRA"]
    assert [each.kind for each in program.code] == ["MOV", "BRA", "EXIT", "BRA", "BRA"]
    assert program.innermost() == [loop] and loop.own_products == 1


def test_guarded_call_is_a_branch():
    """A CALL with a predicate is a branch that does not return.

    Calls to subroutines, such as the one for division, have no predicate.
    """
    assert parse("0040", "@P2 ", "CALL.REL.NOINC", " 0x80").target == 0x80
    assert parse("0040", "", "CALL.REL.NOINC", " 0x80").target is None


def test_unrolled_loops_are_not_aligned():
    (machine,) = loops(code()).children
    plain, products = ttgir.Loop("4"), ttgir.Loop("cdiv(M,64)", products=2)
    assert align([machine], [plain, products, plain]) == [(machine, products)]
    assert align([machine], [products, replace(products)]) is None  # a loop of variable length cannot be unrolled
    assert align([], [plain]) == [] and align([machine], [plain]) is None


def test_work_of_matrix_instructions():
    assert multiply_adds("HGMMA", ["64x32x16", "F32", "BF16"]) == 64 * 32 * 16 // 4
    assert multiply_adds("HGMMA", ["64x32x8", "F32", "TF32"]) == 64 * 32 * 16 // 4  # half the rate
    assert multiply_adds("HMMA", ["16816", "F32", "BF16"]) == 16 * 8 * 16
    assert multiply_adds("FFMA", []) == 0


def launch(**change) -> observed.Launch:
    scalars = dict(N=1000, chunk=256)
    sizes = dict(grid=(4, 3), scalars=scalars, constexprs={}, bytes=1000, elements=1, heads=1, compile=lambda: None)
    return observed.Launch("a_kernel", "key", "source", **sizes | change)


def test_work_of_a_launch_is_summed_over_programs():
    parts = Section("1", Counts(issue=10)), Section("cdiv(min(N-pid_x*chunk,chunk),64)", Counts(issue=100, exp=3))
    issue, *_ = compile_cell.work(parts, launch())
    assert issue == 3 * (4 * 10 + 100 * (4 + 4 + 4 + 4))
    assert Section.parse(str(parts[1])) == parts[1]
    assert compile_cell.work([Section("?", Counts(issue=5))], launch())[0] == 12 * 5


def test_the_slowest_unit_bounds_a_launch():
    def predict(**counts: int) -> launch_times.Time:
        return launch_times.predict(launch(), [Section("1", Counts(**counts))], 4, H100)

    assert (predict().bound, predict().seconds) == ("launch", LAUNCH)
    for name in ("issue", "fma", "alu", "exp", "shared"):
        assert predict(**{name: 10**6}).bound == name
    assert predict(exp=10**6).seconds == pytest.approx(10**6 * 32 * 4 / 16 / (H100.exps / 16 / 132))  # programs run in parallel
    assert launch_times.predict(launch(bytes=10**9), [], 4, H100).bound == "memory"
    assert not launch_times.predict(launch(), [Section("?", Counts())], 4, H100).complete


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["performer_attention"], "expected both OP and --shape, or neither"),
        (["performer_attention", "--shape", "1,2,3"], "expected B,H,N,D or B,H,N,D,M, got '1,2,3'"),
        (
            ["performer_attention", "--shape", "1,2,64,32", "--gpu", "mi300x"],
            "expected NVIDIA GPUs, whose machine code can be counted, got MI300X",
        ),
    ],
)
def test_invalid_calls_give_a_one_line_error(argv, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["dev", "roofline", *argv])
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_a_call_is_predicted_launch_by_launch():
    command = [sys.executable, "-m", "vix_kernels", "dev", "roofline", "performer_attention", "--gpu", "h100"]
    with compile_report.worker_environment():
        shape = ["--shape", "128,4,1024,32,110"]
        out = subprocess.run(
            [*command, *shape], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
        ).stdout
    lines = [line.split() for line in out.splitlines()]
    for direction in ("forward", "backward"):
        times = [line for line in lines if line[:1] == [direction]]
        *launches, total = times
        assert len(launches) >= 2 and total[1] == "sum"
        assert float(total[2]) == pytest.approx(sum(float(each[2]) for each in launches), rel=0.02)
        assert all(
            each[3].strip(",") in ("memory", "launch", "issue", "fma", "alu", "exp", "tensor", "shared", "global")
            for each in launches
        )
    assert "not measured" in out


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](), default=str))
