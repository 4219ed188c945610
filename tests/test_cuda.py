"""What planning does differently for a GPU, shown without one: stand-ins for CUDA's clock, graphs and memory."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoplan import AutoplanError, Plan, apply_plan, benchmark, coldness, planner, record, timing, validate
from autoplan.apply import stand_ins
from autoplan.arms import Contender
from autoplan.candidates import Candidate, base, find_candidate
from autoplan.divergence import call
from autoplan.kernels import find_kernel, ops
from autoplan.kernels.ops import LinearSpec
from autoplan.layers import PlannedLinear
from autoplan.records import COMPILED, EAGER, WITHOUT_GRAPHS, Call, Device, LayerProfile, Shape
from autoplan.request import Request
from autoplan.selection import Budget

H200 = Device("cuda", "NVIDIA H200", (9, 0))


def profile(device: str = "cuda", rows: int = 4) -> LayerProfile:
    return LayerProfile("x", (), 64, 64, False, "bfloat16", device, (Call("default", rows, "bfloat16", 1),))


# Which layers, which kernels.


def test_layers_on_cuda_are_planned_and_those_elsewhere_are_not() -> None:
    recording: Any = SimpleNamespace(
        profiles=lambda: [
            dataclasses.replace(profile(), name=device, device=device) for device in ("cpu", "cuda", "mps")
        ],
        left_alone=[],
        not_called=list,
        siblings=lambda among: [],
    )
    kept, left_alone = Request().layers(recording)
    assert [layer.name for layer in kept] == ["cpu", "cuda"]
    assert [alone.reason for alone in left_alone] == ["it is on mps; layers on cpu and cuda are planned"]


def test_kernels_are_told_the_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[LinearSpec] = []

    def supports(spec: LinearSpec) -> str | None:
        asked.append(spec)
        return None if spec.capability == (9, 0) else f"not on {spec.capability}"

    kernel = dataclasses.replace(find_kernel("linear"), name="tests_cuda", devices=("cuda",), supports=supports)
    monkeypatch.setitem(ops._KERNELS, kernel.name, kernel)
    monkeypatch.setattr(find_candidate("none"), "kernels", ("tests_cuda",))
    assert [k.name for k in find_candidate("none").usable_kernels(profile(), H200)[0]] == ["tests_cuda"]
    older = dataclasses.replace(H200, capability=(8, 0))
    assert find_candidate("none").usable_kernels(profile(), older) == ((), {"tests_cuda": "not on (8, 0)"})
    assert {spec.dtype for spec in asked} == {torch.bfloat16}
    assert find_candidate("none").usable_kernels(profile("cpu"), Device("cpu", "cpu")) == ((), {})


# The clock.


class Event:
    """A CUDA event on a timeline of milliseconds; to be read, it must have been waited for."""

    now_ms = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.done = False

    def record(self) -> None:
        self.at_ms = Event.now_ms

    def synchronize(self) -> None:
        self.done = True

    def elapsed_time(self, end: Event) -> float:
        assert end.done
        return end.at_ms - self.at_ms


def test_the_cuda_clock_counts_the_streams_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = timing.clock_of("cuda")
    readings = []
    for ms in (0.5, 0.0, 2.25):
        Event.now_ms += ms
        readings.append(clock())
    assert readings == [500_000, 500_000, 2_750_000]
    assert timing.clock_of("cpu") is timing.clock_of("mps")


# CUDA graphs.


class Gpu:
    """Time that passes by calls: each launch costs, unless a graph replays it."""

    launch_us, in_graph = 10.0, False

    def __init__(self) -> None:
        self.now_us, self.calls, self.replays = 0.0, 0, 0

    def clock(self) -> int:
        return int(1000 * self.now_us)

    def kernel(self, us: float) -> Callable[[], None]:
        def call() -> None:
            self.calls += 1
            self.now_us += us + (0 if self.in_graph else self.launch_us)

        return call

    def captured(self, run: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            self.in_graph = True
            run()
            self.in_graph, self.replays = False, self.replays + 1

        return replay


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    fake = Gpu()
    monkeypatch.setattr(benchmark, "_captured", fake.captured)
    monkeypatch.setattr(timing, "clock_of", lambda device: fake.clock)
    return fake


def test_graphs_take_the_launches_out_of_the_comparison(gpu: Gpu) -> None:
    arms = [timing.Arm(name, name, [gpu.kernel(us) for _ in range(5)]) for name, us in (("plain", 10.0), ("fast", 4.0))]
    options: Any = {"baseline": "plain", "clock": gpu.clock, "min_batch_us": 1000.0}
    assert timing.race(arms, **options)["fast"].ratio == pytest.approx(0.7)  # (4 + 10) / (10 + 10)
    replayed, calls, notes = benchmark.on_graphs(arms, "plain")
    assert calls == 5 * 10  # turns of 100 us each, launches counted: 10 make a millisecond
    assert notes == {}
    assert [len(arm.calls) for arm in replayed] == [1, 1]
    timed = timing.race(replayed, **options)
    assert gpu.replays
    assert timed["fast"].ratio == pytest.approx(0.4)
    assert timed["plain"].baseline_us / calls == pytest.approx(10.0)


def test_what_no_graph_can_hold_is_timed_call_by_call_and_says_so(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(run: Callable[[], None]) -> Callable[[], None]:
        before = gpu.now_us
        run()
        if gpu.now_us - before == 5 * 10 * (4 + 10):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return gpu.captured(run)

    monkeypatch.setattr(benchmark, "_captured", captured)
    arms = [timing.Arm(name, name, [gpu.kernel(us) for _ in range(5)]) for name, us in (("plain", 10.0), ("odd", 4.0))]
    replayed, calls, notes = benchmark.on_graphs(arms, "plain")
    assert notes == {
        "odd": "timed with its launches, as no CUDA graph can hold it: RuntimeError: operation not permitted when "
        "stream is capturing"
    }
    timed = timing.race(replayed, baseline="plain", clock=gpu.clock, min_batch_us=1000.0)
    assert timed["odd"].ratio == pytest.approx(1.4)  # its launches against none
    assert calls == 50


class Graphs:
    """Stands in for what recording a CUDA graph asks of torch; the second run of a "failing" callable is recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        log = self.log

        class Graph:
            def capture_begin(self, capture_error_mode: str) -> None:
                assert capture_error_mode == "thread_local"
                log.append("begin")

            def capture_end(self) -> None:
                log.append("end")
                if "broke" in log and log.count("end") == 1:
                    raise RuntimeError("operation failed due to a previous error during capture")

            def replay(self) -> None:
                log.append("replay")

        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(benchmark, "_side_stream", lambda device: stream)
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))


def test_a_recorded_graph_keeps_its_tensors_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs(monkeypatch)

    class Weights:
        def __call__(self) -> None:
            graphs.log.append("run")

    run = Weights()
    held = weakref.ref(run)
    replay = benchmark._captured(run)
    assert graphs.log == ["run", "begin", "run", "end"]
    del run
    gc.collect()
    assert held() is not None  # the graph reads their memory, and would read what lies there next
    replay()
    assert graphs.log[-1] == "replay"


def test_a_recording_that_fails_is_followed_by_one_that_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs(monkeypatch)

    def run() -> None:
        if "begin" in graphs.log:
            graphs.log.append("broke")
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):  # the cause, not what followed
        benchmark._captured(run)
    assert graphs.log == ["begin", "broke", "end", "begin", "end"]


def race_on(
    monkeypatch: pytest.MonkeyPatch, mode: str, names: Sequence[str] = ("none", "int8_weight_only")
) -> tuple[list[Any], list[Any]]:
    """A race as on a GPU, with tensors of the CPU: the measurements, and the arms that raced."""
    raced: list[Any] = []
    real_race, randn, generator = timing.race, torch.randn, torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    monkeypatch.setattr(torch, "randn", lambda *size, device=None, **options: randn(*size, **options))
    monkeypatch.setattr(coldness, "copies_on_gpu", lambda weight_bytes: 3)
    monkeypatch.setattr(timing, "clock_of", lambda device: timing.time.perf_counter_ns)
    monkeypatch.setattr(benchmark, "_captured", lambda run: run)

    def race(arms: Any, **options: Any) -> Any:
        raced.extend(arms)
        assert options["min_batch_us"] == 1000
        return real_race(arms, **{**options, "max_seconds": 0.05})

    monkeypatch.setattr(timing, "race", race)
    shape = Shape(4, 64, 64, False, "bfloat16", "bfloat16", "cuda", mode)
    contenders = [
        Contender(find_candidate(name), find_kernel(kernel))
        for name, kernel in (
            ("none", "linear"),
            ("int8_weight_only", "dequantize_int8"),
            ("int8_weight_only", "int_mm"),
        )
        if name in names
    ]
    return benchmark._race(benchmark._arms(shape, 0), contenders, 0, 0, 1.0), raced


@pytest.mark.parametrize("mode", [EAGER, COMPILED, WITHOUT_GRAPHS])
def test_a_race_on_a_gpu(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, raced = race_on(monkeypatch, mode)
    assert {(m.candidate, m.kernel) for m in measured} == {
        ("none", "linear"), ("int8_weight_only", "dequantize_int8"), ("int8_weight_only", "int_mm"),
    }  # fmt: skip
    assert all(0 < m.ratio < float("inf") for m in measured), [m.note for m in measured]
    assert {len(arm.calls) for arm in raced} == {1 if mode == COMPILED else 3}


def test_on_a_gpu_arms_of_one_layout_share_the_copies_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    _, raced = race_on(monkeypatch, EAGER)
    held = {
        arm.name: {call.func._packed[0].data_ptr() for call in arm.calls} for arm in raced if arm.name != "none/linear"
    }
    assert held["int8_weight_only/dequantize_int8"] == held["int8_weight_only/int_mm"]
    assert len(held["int8_weight_only/int_mm"]) == 3


@pytest.mark.parametrize(
    ("weight_mib", "free_gib", "copies"),
    [(32, 100, 23), (8, 100, 90), (1002, 100, 1), (32, 1, 1), (32, 10, 13)],
)
def test_copies_overflow_l2_and_fit_into_memory(
    monkeypatch: pytest.MonkeyPatch, weight_mib: int, free_gib: int, copies: int
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(L2_cache_size=60 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free_gib << 30, 141 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 7 << 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 7 << 20)
    assert coldness.copies_on_gpu(weight_mib << 20) == copies


# Whole models.


def test_a_compiled_model_is_timed_with_cuda_graphs_unless_its_wrapper_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with_graphs, without = torch.compile(model, mode="reduce-overhead"), torch.compile(model)
    assert [planner._mode(m, True) for m in (model, with_graphs, without)] == [COMPILED] * 3  # on a CPU there are none
    monkeypatch.setattr(planner, "device_of_model", lambda model: torch.device("cuda"))
    assert [planner._mode(m, True) for m in (model, with_graphs, without)] == [COMPILED, COMPILED, WITHOUT_GRAPHS]
    assert planner._mode(without, False) == EAGER

    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: seen.append(options) or model)
    assert validate._runner(model, EAGER, "cuda", static=False) is model
    validate._runner(model, COMPILED, "cuda", static=False)
    validate._runner(model, WITHOUT_GRAPHS, "cuda", static=False)
    assert [options.get("mode") for options in seen] == ["reduce-overhead", None]


def test_an_input_is_replayed_where_it_was_recorded() -> None:
    class Moves(nn.Module):
        """Takes input that is elsewhere, as models do that move it themselves."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            assert lengths.is_meta
            return self.fc(x)

    model = Moves()
    with record(model) as recording:
        model(torch.randn(3, 4), torch.empty(3, device="meta"))
    assert recording.inputs[0].args[1].is_meta
    call(model, recording.inputs[0])


# Plans and planned layers that come to another kind of device.


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Candidate:
    """int8 weights, planned on a kernel that only GPUs have."""
    gpu_only = dataclasses.replace(find_kernel("dequantize_int8"), name="tests_gpu_only", devices=("cuda",))
    monkeypatch.setitem(ops._KERNELS, gpu_only.name, gpu_only)

    class Elsewhere(Candidate):
        name, tensors, kernels = (
            "tests_elsewhere",
            ("codes", "scale"),
            ("int8pack", "dequantize_int8", "tests_gpu_only"),
        )

        def quantize(self, weight: Tensor) -> dict[str, Tensor]:
            return find_candidate("int8_weight_only").quantize(weight)

    candidate = Elsewhere()
    monkeypatch.setitem(base._CANDIDATES, candidate.name, candidate)
    return candidate


def test_a_layer_planned_for_a_gpu_runs_on_a_cpu_too(elsewhere: Candidate) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    program = "1:tests_gpu_only,8:tests_gpu_only"
    layer = stand_ins(model, ("0",), elsewhere.name, program)["0"]
    x = torch.randn(3, 64)
    expected = find_candidate("int8_weight_only").linear(x, layer.canonical(), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert layer.program == program  # what a GPU will run
    assert layer._running == "1:dequantize_int8"  # the most general one here
    twin = PlannedLinear.sharing_weight(layer, "twin", nn.Linear(64, 64))
    assert twin(x).shape == (3, 64)


def test_a_plan_made_on_a_gpu_is_stale_where_there_is_none(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    environment = {"environment": {"device_type": "cuda", "device": "NVIDIA H200"}}
    plan = Plan((), (), Budget(divergence=0.01), {"default": 1.0}, COMPILED, environment, (), 0.0, 0.0, None, {})
    apply_plan(nn.Sequential(nn.Linear(4, 4)), plan)
    assert "there is no CUDA device here, it was made on NVIDIA H200" in caplog.text


def test_a_kernel_that_cannot_run_here_is_an_error_that_names_the_layer(elsewhere: Candidate) -> None:
    elsewhere.kernels = ("tests_gpu_only",)
    broken = dataclasses.replace(
        find_kernel("tests_gpu_only"),
        layout=dataclasses.replace(find_kernel("linear").layout, name="tests_broken"),
    )
    ops._KERNELS["tests_gpu_only"] = broken
    with pytest.raises(AutoplanError, match="layer '0'"):
        stand_ins(nn.Sequential(nn.Linear(64, 64)), ("0",), elsewhere.name, "1:tests_gpu_only")
