"""Derived values against figures worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest

from vidbench.metrics import METRICS, ONE_ROUND, SEVERITY, case_columns, frame, median_rank, scaling_exponents
from vidbench.records import Accuracy, Ceilings, Counts, Error, Measurement, Memory, Status
from vidbench.sweep import Point

POINT = Point("conv3d", "op", "library", case={"batch_size": 4, "clip_length": 16, "kernel_size": (3, 3, 3)})


def table(*measurements: Measurement) -> pd.DataFrame:
    return frame(measurements, run_id="r", suite="s")


def ok(*samples: float, point: Point = POINT, number: int = 0, **fields: Any) -> Measurement:
    return Measurement(point, number, "ok", samples_s=samples, **fields)


def row(*measurements: Measurement) -> pd.Series:
    found = table(*measurements)
    assert len(found) == 1
    return found.iloc[0]


def test_the_columns_are_those_of_the_design() -> None:
    wanted = """
        run_id suite point workload kind implementation mode regime device dtype memory_format task rounds
        kernel_size batch_size clip_length height width status reason latency_s latency_low_s latency_high_s samples
        throughput_clips_per_s macs flops params bytes_moved peak_memory_bytes achieved_flops_per_s roofline_fraction
        relative_error top1_accuracy chance_accuracy energy_j cold_start_s trust trust_reasons uncounted
    """.split()  # noqa: SIM905
    assert list(table(ok(1.0)).columns) == wanted
    assert list(table().columns) == [name for name in wanted if name != "kernel_size"]


def test_a_first_call_and_what_no_counter_knew_are_told() -> None:
    counts = Counts(10, {"meta": 10}, ("meta: aten::fft", "fvcore: aten::fft"))
    found = row(ok(1.0, cold_start_s=3.0), ok(1.0, number=1, cold_start_s=5.0, counts=counts))
    assert (found["cold_start_s"], found["uncounted"]) == (4.0, "meta: aten::fft; fvcore: aten::fft")
    assert row(ok(1.0, counts=Counts(10)))[["cold_start_s", "uncounted"]].isna().all()


def test_case_keys_are_columns_with_nullable_types() -> None:
    found = table(
        ok(1.0, point=Point("a", "op", "x", case={"kernel_size": 3, "bias": True, "width_multiplier": 0.5})),
        ok(1.0, point=Point("b", "op", "x", case={"kernel_size": (1, 3, 3), "hidden_size": 8, "width_multiplier": 1})),
    )
    assert found["kernel_size"].tolist() == ["3", "1x3x3"]
    assert found["bias"].isna().tolist() == [False, True]
    assert found["hidden_size"].dtype == "Int64"
    assert found["width_multiplier"].tolist() == [0.5, 1.0]
    assert found["height"].isna().all()
    assert set(case_columns(found)) == {
        "kernel_size", "bias", "hidden_size", "width_multiplier", "batch_size", "clip_length", "height", "width",
    }  # fmt: skip


def test_latency_is_the_median_of_the_medians_of_rounds() -> None:
    found = row(ok(1, 2, 9, number=0), ok(3, 3, 3, number=1), ok(10, 20, 30, 40, number=2))
    assert found["latency_s"] == 3.0
    assert found["rounds"] == 3
    assert found["samples"] == 10


def test_the_interval_of_two_rounds_is_a_t_interval_on_their_logs() -> None:
    # Medians e^-1 and e^1: the logs have mean 0, deviation √2, error 1; t(0.975, 1 degree) = 12.7062.
    found = row(ok(math.exp(-1), number=0), ok(math.exp(1), number=1))
    assert found["latency_low_s"] == pytest.approx(math.exp(-12.706205), rel=1e-5)
    assert found["latency_high_s"] == pytest.approx(math.exp(12.706205), rel=1e-5)


def test_the_interval_of_four_rounds() -> None:
    # Logs 0, 0, ln 2, ln 2: mean ln √2, deviation ln 2 / √3, error ln 2 / √12; t(0.975, 3 degrees) = 3.182446.
    found = row(*(ok(value, number=number) for number, value in enumerate((1.0, 2.0, 1.0, 2.0))))
    half = 3.182446 * math.log(2) / math.sqrt(12)
    assert found["latency_s"] == 1.5
    assert found["latency_low_s"] == pytest.approx(math.sqrt(2) * math.exp(-half), rel=1e-6)
    assert found["latency_high_s"] == pytest.approx(math.sqrt(2) * math.exp(half), rel=1e-6)


def test_the_interval_holds_the_latency() -> None:
    found = row(*(ok(value, number=number) for number, value in enumerate([1.0] * 8 + [1e-6])))
    assert found["latency_low_s"] <= found["latency_s"] <= found["latency_high_s"]


def test_one_round_has_the_order_statistics_of_its_samples() -> None:
    # Of ten samples the 2nd and 9th: P(X ≤ 1) = 11/1024 = 0.0107 for X ~ B(10, 1/2), and 56/1024 = 0.0547 is too much.
    found = row(ok(*range(10, 0, -1)))
    assert (found["latency_low_s"], found["latency_s"], found["latency_high_s"]) == (2.0, 5.5, 9.0)
    assert found["trust"] == "fair"
    assert found["trust_reasons"] == ONE_ROUND


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (5, 0), (6, 1), (8, 1), (9, 2), (10, 2), (30, 10), (100, 40)])
def test_the_rank_of_the_interval_is_the_largest_that_is_sure_enough(size: int, rank: int) -> None:
    assert median_rank(size) == rank
    below = sum(math.comb(size, k) for k in range(rank)) / 2**size
    assert below <= 0.025 < below + math.comb(size, rank) / 2**size


def test_too_few_samples_have_no_interval() -> None:
    found = row(ok(1.0, 2.0, 3.0))
    assert found["latency_s"] == 2.0
    assert pd.isna(found["latency_low_s"])
    assert pd.isna(found["latency_high_s"])


@pytest.mark.parametrize("status", SEVERITY[1:])
def test_one_bad_round_is_enough_and_keeps_its_reason(status: Status) -> None:
    bad = Measurement(POINT, 1, status, "because", error=Error(0.5, 1e-6), counts=Counts(7))
    found = row(ok(1.0, 2.0, memory=Memory(1, 2)), bad, ok(1.0, number=2))
    assert (found["status"], found["reason"], found["rounds"]) == (status, "because", 3)
    for name in ("latency_s", "latency_low_s", "throughput_clips_per_s", "peak_memory_bytes", "trust"):
        assert pd.isna(found[name]), name
    assert found["relative_error"] == 0.5
    assert found["macs"] == 7


def test_the_worst_status_wins() -> None:
    found = row(Measurement(POINT, 0, "timeout", "slow"), Measurement(POINT, 1, "failed", "wrong"), ok(1.0, number=2))
    assert (found["status"], found["reason"]) == ("failed", "wrong")


def test_work_and_speed() -> None:
    # 6e9 FLOP at 1e10/s take 0.6 s, 4e9 bytes at 5e9/s take 0.8 s: of 2 s, that is 0.4.
    fields: dict[str, Any] = {
        "counts": Counts(3 * 10**9), "bytes_moved": 4 * 10**9, "params": 5, "memory": Memory(1, 9),
        "error": Error(1e-7, 1e-6), "ceilings": Ceilings(1e10, 5e9), "energy_j": 3.0,
    }  # fmt: skip
    found = row(ok(2.0, **fields), ok(2.0, number=1, **{**fields, "memory": Memory(1, 11), "error": Error(2e-7, 1e-6)}))
    assert (found["macs"], found["flops"], found["params"], found["bytes_moved"]) == (3e9, 6e9, 5, 4e9)
    assert found["throughput_clips_per_s"] == 2.0
    assert found["achieved_flops_per_s"] == 3e9
    assert found["roofline_fraction"] == pytest.approx(0.4)
    assert found["peak_memory_bytes"] == 11
    assert found["relative_error"] == 2e-7
    assert found["energy_j"] == 3.0


def test_the_roofline_without_bytes_is_by_work_alone() -> None:
    found = row(ok(2.0, counts=Counts(3 * 10**9), ceilings=Ceilings(1e10, 5e9)))
    assert found["roofline_fraction"] == pytest.approx(0.3)
    assert pd.isna(row(ok(2.0, counts=Counts(3)))["roofline_fraction"])


def test_what_does_not_apply_is_missing_not_zero() -> None:
    found = row(ok(1.0, point=Point("decode", "stage", "pyav")))
    for name in METRICS:
        assert name in ("latency_s", "samples") or pd.isna(found[name]), name


def test_a_streaming_step_has_no_clips_per_second() -> None:
    point = Point("cnn_tcn", "model", "eager", "stream", case={"batch_size": 2})
    assert pd.isna(row(ok(1.0, point=point))["throughput_clips_per_s"])


def test_an_error_that_is_no_number_is_infinite() -> None:
    assert row(ok(1.0, error=Error(math.nan, 1e-6)))["relative_error"] == math.inf


def test_trust_is_the_worst_of_the_rounds_with_every_reason() -> None:
    found = row(
        ok(1.0, trust="fair", trust_reasons=("warm", "shared")),
        ok(1.0, number=1, trust="poor", trust_reasons=("throttled", "shared")),
        ok(1.0, number=2),
    )
    assert found["trust"] == "poor"
    assert found["trust_reasons"] == "warm; shared; throttled"


def evaluated(seed: int, top1: float, task: str = "frame_order", workload: str = "c3d", **case: Any) -> Measurement:
    point = Point(workload, "task", "eager", "evaluate", case={"clip_length": 16, "seed": seed, "task": task, **case})
    return Measurement(point, 0, "ok", accuracy=Accuracy(task, seed, top1, 0.25, 100, 9.0))


def model(workload: str = "c3d", mode: str = "forward", **case: Any) -> Measurement:
    return ok(1.0, point=Point(workload, "model", "eager", mode, case={"clip_length": 16, "batch_size": 1, **case}))


def test_accuracy_is_merged_over_seeds_into_rows_of_the_same_shape() -> None:
    found = table(
        evaluated(0, 0.5), evaluated(1, 0.7), model(), model(mode="train"), model(width_multiplier=1.0),
        model(width_multiplier=0.5), model(clip_length=8), model("r3d_18"),
    )  # fmt: skip
    assert found["top1_accuracy"].iloc[:2].tolist() == [0.5, 0.7]
    assert found["top1_accuracy"].iloc[2:5].tolist() == pytest.approx([0.6] * 3)
    assert found["task"].iloc[2:5].tolist() == ["frame_order"] * 3
    assert found["chance_accuracy"].iloc[2] == 0.25
    assert found["top1_accuracy"].iloc[5:].isna().all()
    assert found["task"].iloc[5:].isna().all()
    assert found["latency_s"].iloc[:2].isna().all()
    assert pd.isna(found["trust_reasons"].iloc[0])


def test_accuracies_of_several_tasks_are_not_mixed() -> None:
    found = table(evaluated(0, 0.5), evaluated(0, 0.9, task="direction"), model())
    assert pd.isna(found["top1_accuracy"].iloc[2])
    assert pd.isna(found["task"].iloc[2])


def test_a_failed_training_is_a_row_with_its_reason() -> None:
    found = row(Measurement(Point("c3d", "task", "eager", "evaluate"), 0, "failed", "loss is not a number"))
    assert (found["status"], found["reason"]) == ("failed", "loss is not a number")
    assert pd.isna(found["top1_accuracy"])


def power_law(exponent: float, name: str = "x", lengths: tuple[int, ...] = (8, 16, 64, 256)) -> Iterator[Measurement]:
    for length in lengths:
        point = Point("lstm", "op", name, case={"clip_length": length, "hidden_size": 64})
        yield ok(3e-4 * length**exponent, point=point)


def test_the_exponent_of_a_power_law_is_exact() -> None:
    found = scaling_exponents(table(*power_law(1.0, "a"), *power_law(0.5, "b"), *power_law(2.0, "c", (8, 16))))
    assert found["implementation"].tolist() == ["a", "b", "c"]
    assert found["points"].tolist() == [4, 4, 2]
    assert found["exponent"].iloc[:2].tolist() == pytest.approx([1.0, 0.5])
    assert found["standard_error"].iloc[:2].tolist() == pytest.approx([0.0, 0.0], abs=1e-9)
    assert found[["exponent", "standard_error", "exponent_low", "exponent_high"]].iloc[2].isna().all()


def test_the_error_of_an_exponent() -> None:
    # In base-2 logs x = 0, 1, 2 and y = 0, 2, 1: the slope is 1/2 and the residuals are -1/2, 1, -1/2, so that
    # s² = 3/2 on one degree of freedom, over Σ(x - x̄)² = 2.
    points = [Point("lstm", "op", "a", case={"clip_length": n}) for n in (1, 2, 4)]
    found = scaling_exponents(table(*(ok(s, point=p) for s, p in zip((1.0, 4.0, 2.0), points, strict=True)))).iloc[0]
    error = math.sqrt(1.5 / 2)
    assert found["exponent"] == pytest.approx(0.5)
    assert found["standard_error"] == pytest.approx(error)
    assert found["exponent_high"] == pytest.approx(0.5 + 12.706205 * error, rel=1e-6)
    assert found["exponent_low"] == pytest.approx(0.5 - 12.706205 * error, rel=1e-6)


def test_exponents_over_height_let_width_vary() -> None:
    points = [Point("c3d", "model", "eager", case={"height": n, "width": n}) for n in (56, 112, 224)]
    found = scaling_exponents(table(*(ok(float(p.case["height"]) ** 2, point=p) for p in points)), over="height")  # type: ignore[arg-type]
    assert found["exponent"].tolist() == pytest.approx([2.0])


def test_exponents_leave_out_what_did_not_run() -> None:
    bad = Measurement(Point("lstm", "op", "x", case={"clip_length": 512, "hidden_size": 64}), 0, "oom", "full")
    assert scaling_exponents(table(*power_law(1.0), bad))["points"].tolist() == [4]
    assert scaling_exponents(table(bad)).empty
    assert scaling_exponents(table(bad), over="dilation").empty
