"""Tests of operator costs, the times predicted from these costs, and the tuning of launch configurations.

The tests need no GPU.
"""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace

import pytest
import torch

from conftest import NO_TRITON
from vix_kernels.__main__ import main
from vix_kernels.measure import roofline
from vix_kernels.measure.roofline import GPUS, KEY, Row, predict
from vix_kernels.testing import SPECS, Case

pytestmark = NO_TRITON

CASE = Case("costs", batch=2, heads=3, tokens=40, queries=10, width=16, value_width=24, features=9)
H100 = next(gpu for gpu in GPUS if gpu.name == "H100")


def cost(op: str, direction: str = "forward", case: Case = CASE, dtype: torch.dtype = torch.bfloat16):
    from vix_kernels.measure.costs import cost

    return cost(SPECS[op], case, dtype, direction, "sm_90")


def test_forward_bytes_are_inputs_and_outputs() -> None:
    """Compare the number of bytes with a count by hand.

    The numbers of queries and keys differ, values are wider than keys, and the statistics of each row are saved.
    """
    k, v, q, out = 2 * 3 * 40 * 16 * 2, 2 * 3 * 40 * 24 * 2, 2 * 3 * 10 * 16 * 2, 2 * 3 * 10 * 24 * 2
    slots, values, lse, rows = 9 * 16 * 4, 2 * 3 * 9 * 24 * 4, 2 * 3 * 9 * 4, 2 * 3 * 10 * 4
    state = values + 3 * lse  # lse, running max and total
    assert cost("aggregate").bytes == slots + k + v + state
    assert cost("performer_attention").bytes == (slots + k + v + state) + (q + slots + values + lse + out + 2 * rows)


def test_bytes_count_masks_tables_and_a_shared_projection_once() -> None:
    square = replace(CASE, queries=None)
    plain, masked = cost("aggregate", case=square).bytes, cost("aggregate", case=replace(square, masked=True)).bytes
    assert masked == plain + 2 * 40
    rotated = cost("aggregate", case=replace(square, rope="half")).bytes
    assert rotated == plain + 2 * 40 * 8 * 4
    assert cost("aggregate", case=replace(square, batch=4)).bytes - plain == plain - 9 * 16 * 4


def test_flops_and_exponentials_follow_queries_and_tokens() -> None:
    each = 2 * 3 * 9
    forward, backward = cost("performer_attention"), cost("performer_attention", "backward")
    assert forward.exps == backward.exps == each * (40 + 10)
    assert forward.flops == 2 * each * (40 + 10) * (16 + 24) and backward.flops == 2 * forward.flops


def test_launch_counts_match_a_real_call(monkeypatch) -> None:
    from vix_kernels._triton import launch as launcher

    counted = [cost("performer_attention", direction).launches for direction in ("forward", "backward")]
    problem = SPECS["performer_attention"].problem(CASE)
    leaves = {name: x.requires_grad_(name != "projection") for name, x in problem.tensors.items()}
    made, run = [], launcher.launch
    for module in ("aggregate", "broadcast", "merge", "prepare"):
        monkeypatch.setattr(f"vix_kernels._triton.{module}.launch", lambda *args, **meta: (made.append(1), run(*args, **meta)))
    outputs = replace(problem, tensors=leaves)(backend="triton")
    forward = len(made)
    torch.autograd.grad(outputs[0].sum(), [x for x in leaves.values() if x.requires_grad])
    assert counted == [forward, len(made) - forward]


def test_counting_restores_the_observer_and_the_driver() -> None:
    from triton.runtime.driver import driver

    from vix_kernels import conditions

    active = driver._active
    cost("apply_rope", case=replace(CASE, queries=None, rope="half"))
    assert conditions.current.observer is None and driver._active is active


@pytest.mark.parametrize(
    "change, bound",
    [
        (dict(bytes=10**12), "memory"),
        (dict(flops=10**15), "matrix"),
        (dict(exps=10**13), "exp"),
        (dict(launches=10**6), "launch"),
    ],
)
def test_the_slowest_resource_determines_the_prediction(change: dict, bound: str) -> None:
    seconds, on = predict(replace(cost("aggregate"), **change), H100, "bf16")
    rates = dict(memory=H100.bandwidth, matrix=H100.matrix, exp=H100.exps, launch=1 / roofline.LAUNCH)
    assert on == bound and seconds == pytest.approx(next(iter(change.values())) / rates[bound])


def test_float32_uses_the_faster_of_two_units() -> None:
    rates = {gpu.name: gpu.flops("fp32") for gpu in GPUS}
    assert rates["A100"] == 156e12 / 3 and rates["RTX 4090"] == 82.6e12


def test_measured_times_are_matched_to_predictions(tmp_path, capsys) -> None:
    """A prediction is compared only with the newest measurement of Triton kernels for the same GPU, shape and direction."""
    first = asdict(next(roofline.rows(["apply_rope"], [H100], ["bf16"])))
    line = {name: first[name] for name in KEY} | dict(device="NVIDIA H100 80GB HBM3", provider="triton", device_ms="")
    for run, milliseconds in (("2026-01-02-aaa", 0.25), ("2026-01-03-bbb", 0.5)):
        folder = tmp_path / "results" / "h100-sxm" / run
        folder.mkdir(parents=True)
        with (folder / "timing.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, line)
            writer.writeheader()
            writer.writerow(line | dict(device_ms=milliseconds))
            writer.writerow(line | dict(device_ms=9, provider="torch"))
            writer.writerow(line | dict(device_ms=9, device="NVIDIA H100 PCIe"))
            writer.writerow(line | dict(device_ms=9, tokens=7))
            writer.writerow(line)  # a skipped measurement has a row without a time
    table = tmp_path / "roofline.csv"
    arguments = ["--op", "apply_rope", "--results", str(tmp_path / "results"), "--csv", str(table), "--plot", f"{table}.png"]
    assert main(["dev", "roofline", *arguments]) == 0
    assert f"wrote {table}" in capsys.readouterr().out and (tmp_path / "roofline.csv.png").stat().st_size
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == roofline.COLUMNS and {row["gpu"] for row in rows} == {gpu.name for gpu in GPUS}
    assert [row["measured_us"] for row in rows if row["measured_us"]] == ["500"]
    assert next(row for row in rows if row["measured_us"])["gpu"] == "H100"


def test_the_table_is_labeled_as_a_prediction(capsys) -> None:
    assert main(["dev", "roofline", "--op", "apply_rope", "--gpu", "H100", "--results", "/nowhere"]) == 0
    out = capsys.readouterr().out
    assert "predicted_us" in out and "not from measurements" in out
    assert isinstance(next(roofline.rows(["aggregate"], [H100], ["fp32"])), Row)


class TestTune:
    """Tests of tuning in Triton's interpreter, where times are meaningless but results are correct."""

    KEY = ("aggregate_forward", 32, 16)

    def test_dry_run_writes_a_proposal_and_changes_nothing(self, tmp_path, capsys) -> None:
        from vix_kernels._triton import launch_table

        before = dict(launch_table.OVERRIDES)
        assert main(["dev", "tune", "--dry-run", "--seconds", "200", "--output", str(tmp_path / "found.json")]) == 0
        assert launch_table.OVERRIDES == before
        (row,) = json.loads((tmp_path / "found.json").read_text())["proposals"]
        assert (row["kernel"], row["bits"], row["width"]) == self.KEY and row["tried"] > 0
        assert row["present"] == launch_table.INTERPRETER._asdict() and row["best_ms"] <= row["present_ms"]
        counted, entries = capsys.readouterr().out.split("\n\n")
        found = {"interpreter": {}}
        exec(entries, {"OVERRIDES": found, "Tile": launch_table.Tile})
        expected = {} if row["best"] == row["present"] else {self.KEY: launch_table.Tile(**row["best"])}
        assert found == {"interpreter": expected}
        assert "1 of 1 keys" in counted

    def test_a_trial_changes_launches_until_it_ends(self) -> None:
        from vix_kernels.measure import tune

        bench = tune.Bench(SPECS["aggregate"], "backward", Case("tune", 1, 1, 20, features=8, learned=True), 32, "cpu")
        keys = bench.keys()
        assert {key[0] for key in keys} >= {"aggregate_forward", "aggregate_tokens", "aggregate_slots"}
        tile = tune.present_tile("interpreter", self.KEY)._replace(slots=16)
        with tune.trial(self.KEY, tile):
            assert tune.present_tile("interpreter", self.KEY) == tile
        assert tune.present_tile("interpreter", self.KEY) != tile

    def test_incorrect_or_failing_tiles_are_refused(self, monkeypatch) -> None:
        import time

        from vix_kernels.measure import tune

        bench = tune.Bench(SPECS["aggregate"], "forward", Case("tune", 1, 1, 20, features=8), 32, "cpu")
        run, wrong = bench.run, tune.present_tile("interpreter", self.KEY)._replace(slots=64)

        def other_numbers():
            tile = tune.present_tile("interpreter", self.KEY)
            if tile.slots == 16:
                raise RuntimeError("out of resource: shared memory")
            return tuple(2 * x for x in run()) if tile == wrong else run()

        monkeypatch.setattr(bench, "run", other_numbers)
        monkeypatch.setattr(tune, "device_time", lambda function: tune_time(tune))
        found = tune.tune_key(bench, "interpreter", self.KEY, time.monotonic() + 60)
        reasons = " ".join(found.refused)
        assert "out of resource" in reasons and f"{wrong}: ValueError: different results" in reasons
        assert found.best.tokens == 256 and found.best.slots != 16

    def test_every_field_of_a_tile_is_varied(self) -> None:
        from vix_kernels._triton.launch_table import Tile
        from vix_kernels.measure.tune import neighbours

        tile = Tile(slots=0, tokens=64, num_warps=4, num_stages=2)
        changed = [name for each in neighbours(tile) for name in Tile._fields if getattr(each, name) != getattr(tile, name)]
        assert sorted(changed) == ["apart", *["num_stages"] * 2, *["num_warps"] * 2, *["tokens"] * 2]

    def test_without_a_gpu_it_prints_one_sentence(self, capsys) -> None:
        if torch.cuda.is_available():
            pytest.skip("needs a machine without a GPU")
        assert main(["dev", "tune"]) == 0
        assert capsys.readouterr().out.startswith("vix dev tune: nothing to measure here: torch sees no GPU")


def tune_time(tune):
    """Return a simulated time. Tiles with more tokens are faster."""
    from vix_kernels.measure.timing import DeviceTime

    tokens = tune.present_tile("interpreter", TestTune.KEY).tokens
    return DeviceTime((1 / tokens,), "cpu")
