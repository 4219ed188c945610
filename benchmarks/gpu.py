"""Every kernel for the GPU: is it right, how long does it take, how near is that to what the hardware allows?

    python benchmarks/gpu.py                             # layers of Llama-3-8B and SAM ViT-B; meant to take under 8
                                                         # minutes on an H200
    python benchmarks/gpu.py --shapes 4096x4096 --rows 1 16
    python benchmarks/gpu.py --write-seeds kernels/cuda/seeds.json
    python benchmarks/gpu.py --device cpu --small        # does the script work? Of no use as a measurement

First every kernel is held to float64, under the configs that will be timed, on a few output features; one that is
wrong is not timed, and makes the exit code 1. Then, for each shape and number of rows, all kernels race plain F.linear
in one interleaved run, as in planning: CUDA graphs over enough copies of random weights to overflow the L2 cache. Of a
kernel with configs the best is shown. The floor of a kernel is the time that its bytes or its products take at the
rates in kernels/cuda/gpus.py, whichever is more. Other libraries, where they can be imported, race F.linear in runs of
their own beside that; what fails there is a row with the reason. Prints a table; writes gpu.csv, and the best configs
as seeds.json, into benchmarks/results/<device>/.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib
import itertools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from result_files import folder_of, measured_on, write_csv
from tabulate import tabulate
from torch import Tensor, nn
from workbench import floor, whole

from autoplan import benchmark, coldness, kernels, options, timing
from autoplan.cache import fingerprint
from autoplan.candidates import Candidate, find_candidate
from autoplan.candidates.base import select
from autoplan.kernels.ops import find_kernel
from autoplan.kernels.reference import linear_float64, relative_error
from autoplan.records import COMPILED, EAGER, Call, Device, LayerProfile, Measurement, Shape
from autoplan.request import device_of

SHAPES = ("4096x4096", "1024x4096", "6144x4096", "14336x4096", "28672x4096", "4096x14336", "128256x4096")
ROWS = (1, 16, 2048, 4, 64, 32, 128, 512)
IMAGES = (("2304x768", 32768), ("768x768", 32768), ("3072x768", 32768), ("768x3072", 32768))  # SAM ViT-B, batch 8
CANDIDATES = ("none", "int8_weight_only", "int8_dynamic", "fp8_weight_only", "fp8_dynamic", "int4_g128")
PEER_ROWS = (1, 16, 2048, 32768)
PEER_SHAPES = ("4096x4096", "14336x4096", "6144x4096", *(size for size, _ in IMAGES))
FIELDS = ("shape", "rows", "name", "kernel", "config", "us", "baseline_us", "ratio", "low", "high", "floor_us",
          "of_floor", "note")  # fmt: skip
_SECONDS_A_RACE = 6.0
_TOLERANCE = 4e-3  # relative error of a bf16 output, against float64
_TOLERANCE_DYNAMIC = 1e-2  # against float64 on quantized activations, whose ties may fall either way
_CHECK_OUT, _CHECK_ROWS = 272, 130  # of trials: odd for every tile, and little work for float64

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What is to be measured, and on what."""

    device: Device
    environment: dict[str, Any]
    candidates: tuple[Candidate, ...]
    cases: tuple[tuple[tuple[int, int], int], ...]  # (out_features, in_features), rows
    mode: str
    ends: float  # by time.monotonic
    seconds_a_race: float
    seed: int

    def profile(self, size: tuple[int, int], rows: int) -> LayerProfile:
        calls = (Call("default", rows, "bfloat16", 1),)
        return LayerProfile("layer", (), size[1], size[0], False, "bfloat16", self.device.type, calls)

    def wanted(self, size: tuple[int, int], rows: int) -> dict[Shape, list[benchmark.Contender]]:
        """What races at one shape."""
        menu = options.screen(self.profile(size, rows), self.candidates, self.device)
        return options.to_time([menu], self.mode)

    def seconds_left(self) -> float:
        return self.ends - time.monotonic()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="two tiny shapes, a fraction of a second each")
    parser.add_argument("--shapes", nargs="+", metavar="OUTxIN")
    parser.add_argument("--rows", nargs="+", type=int)
    parser.add_argument("--candidates", nargs="+", default=CANDIDATES)
    parser.add_argument("--mode", choices=[COMPILED, EAGER], default=COMPILED, help="compiled: with CUDA graphs")
    parser.add_argument("--seconds", type=float, default=450.0, help="time for all of it (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--write-seeds", type=Path, metavar="FILE", help="merge the best configs into this file, too")
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results/<device>)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device here; --device cpu --small shows that the script works", file=sys.stderr)
        return 2
    began = time.monotonic()
    bench = _bench(arguments, began)
    print(f"{bench.environment['device']}, torch {torch.__version__}, {bench.mode}", flush=True)
    to_check = trials(bench)
    if arguments.device == "cuda" and arguments.jobs > 1:
        compile_ahead(to_check, arguments.jobs)
    wrong = check(to_check, arguments.device)
    for reason in wrong.values():
        print(f"WRONG: {reason}", flush=True)
    print(f"checked {len(to_check)} in {time.monotonic() - began:.0f} s: {len(wrong)} wrong", flush=True)
    rows: list[Row] = []
    seeds: list[Any] = []
    out = arguments.out or folder_of(bench.environment)
    for case in bench.cases:
        rows += measure(bench, *case, wrong, seeds)
        write(out, bench, rows)  # whatever comes after it
        write_seeds([out / "seeds.json", *([arguments.write_seeds] if arguments.write_seeds else [])], seeds)
    if not arguments.no_peers:
        rows += peers(bench, arguments.small)
    write(out, bench, rows)
    print(tabulate([{**row, "note": row["note"][:60]} for row in rows], headers="keys", floatfmt=".3g"))
    print(f"{len(rows)} rows in {time.monotonic() - began:.0f} s; written to {out}")
    return 1 if wrong else 0


def write(out: Path, bench: Bench, rows: list[Row]) -> None:
    """Put the rows in order, by shape, rows and time, and write them."""
    order = {f"{n}x{k}": i for i, (n, k) in enumerate(dict.fromkeys(size for size, _ in bench.cases))}
    rows.sort(key=lambda row: (order.get(row["shape"], len(order)), row["rows"], row["us"]))
    figures = [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    write_csv(out / "gpu.csv", figures, measured_on(bench.environment, mode=bench.mode))


def _bench(arguments: argparse.Namespace, began: float) -> Bench:
    profile = LayerProfile("layer", (), 64, 64, False, "bfloat16", arguments.device, ())
    return Bench(
        device=device_of(profile),
        environment=fingerprint.environment(arguments.device, fingerprint.source_digest(kernels)),
        candidates=select(arguments.candidates),
        cases=tuple((_size(shape), rows) for shape, rows in _cases(arguments)),
        mode=arguments.mode,
        ends=began + arguments.seconds,
        seconds_a_race=0.1 if arguments.small else _SECONDS_A_RACE,
        seed=arguments.seed,
    )


def _cases(arguments: argparse.Namespace) -> list[tuple[str, int]]:
    """What is asked for, or all there is: the telling ones first, should time run out."""
    shapes = arguments.shapes or (("96x64", "48x128") if arguments.small else SHAPES)
    if arguments.small or arguments.shapes or arguments.rows:
        return [(shape, rows) for rows in arguments.rows or ((1, 16) if arguments.small else ROWS) for shape in shapes]
    first, later = ([(shape, rows) for rows in some for shape in shapes] for some in (ROWS[:3], ROWS[3:]))
    return [*first, *IMAGES, *later]


def _size(text: str) -> tuple[int, int]:
    out_features, in_features = map(int, text.split("x"))
    return out_features, in_features


# -- compiling and checking ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A kernel, under the config it will be timed with, on a few output features of a layer."""

    candidate: str
    kernel: str
    in_features: int
    rows: int
    has_bias: bool = False


def trials(bench: Bench) -> list[Trial]:
    """Every kernel and config that will be timed, at the fewest and the most rows of its cases; kernels also biased.

    Of in_features the most, as errors grow with these.
    """
    cases: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for size, rows in bench.cases:
        for contender in itertools.chain.from_iterable(bench.wanted(size, rows).values()):
            own = cases.setdefault((contender.candidate.name, contender.kernel.name), [])
            own.append((size[1], min(rows, _CHECK_ROWS)))
    found: dict[Trial, None] = {}
    for (candidate, kernel), own in cases.items():
        most, rows = max(k for k, _ in own), [rows for _, rows in own]
        for some in (min(rows), max(rows)):
            found[Trial(candidate, kernel, most, some)] = None
        found[Trial(candidate, kernel.partition("@")[0], most, 3, has_bias=True)] = None
    return list(found)


def compile_ahead(wanted: Sequence[Trial], jobs: int) -> None:
    """Run every trial once, in processes of its own: the code lands in Triton's cache."""
    began = time.monotonic()
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with concurrent.futures.ProcessPoolExecutor(min(jobs, len(wanted)), mp_context=spawn) as pool:
        failed = sum(not ran for ran in pool.map(runs, wanted, chunksize=4))
    print(f"compiled {len(wanted)} kernels in {time.monotonic() - began:.0f} s, {failed} failed", flush=True)


def runs(trial: Trial) -> bool:
    """Whether a trial runs on the GPU. Why not, `check` will tell."""
    try:
        error_of(trial, "cuda")
    except Exception:
        return False
    return True


def check(wanted: Sequence[Trial], device: str) -> dict[tuple[str, str], str]:
    """(candidate, kernel) of what fails or differs from float64, and how."""
    wrong = {}
    for trial in wanted:
        try:
            error = error_of(trial, device)
        except Exception as failure:
            wrong[trial.candidate, trial.kernel] = f"{trial}: {failure}"
            continue
        if not error <= 1:
            wrong[trial.candidate, trial.kernel] = f"{trial}: the error is {error:.1f} times what is allowed"
    return wrong


def error_of(trial: Trial, device: str) -> float:
    """The relative error of a trial against float64, over what is allowed.

    What quantizes activations is held to float64 on quantized activations.
    """
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    candidate, kernel = find_candidate(trial.candidate), find_kernel(trial.kernel)
    weight, x = draw(_CHECK_OUT, trial.in_features).bfloat16(), draw(trial.rows, trial.in_features).bfloat16()
    bias = draw(_CHECK_OUT).bfloat16() if trial.has_bias else None
    canonical = candidate.quantize(weight)
    meant = candidate.linear(x.double(), canonical, None if bias is None else bias.double())
    dynamic = relative_error(meant, linear_float64(x, canonical, bias)) > 1e-6
    y = kernel.run(x, kernel.layout.pack(canonical), bias, torch.bfloat16)
    return relative_error(y, meant) / (_TOLERANCE_DYNAMIC if dynamic else _TOLERANCE)


# -- our kernels -----------------------------------------------------------------------------------------------------


def measure(
    bench: Bench, size: tuple[int, int], rows: int, wrong: Mapping[tuple[str, str], str], seeds: list[Any]
) -> Iterator[Row]:
    """One row per candidate and kernel, under its best config. Adds the configs, best first, to `seeds`."""
    wanted = bench.wanted(size, rows)
    right = {
        shape: [c for c in contenders if (c.candidate.name, c.kernel.name) not in wrong]
        for shape, contenders in wanted.items()
    }
    seconds_left = functools.partial(_at_most, bench.seconds_a_race, bench)
    found = benchmark.measure(right, bench.environment, None, seed=bench.seed, seconds_left=seconds_left)
    if not found:
        yield _row(size, rows, "", "", note=f"not run: the {bench.mode} time was used up")
        return
    best: dict[tuple[str, str], list[Measurement]] = {}
    for m in sorted(found.values(), key=lambda m: m.ratio):
        best.setdefault((m.candidate, m.kernel.partition("@")[0]), []).append(m)
    for (candidate, kernel), own in best.items():
        m = own[0]
        least = _floor_us(find_candidate(candidate), size, rows, bench)
        us = m.ratio * m.baseline_us
        yield _row(
            size, rows, candidate, kernel, config=m.kernel.partition("@")[2], us=us, baseline_us=m.baseline_us,
            ratio=m.ratio, low=m.ratio_low, high=m.ratio_high, floor_us=least, of_floor=least / us, note=m.note,
        )  # fmt: skip
        configs = [m.kernel.partition("@")[2] for m in own if m.ratio < math.inf and "@" in m.kernel]
        if configs:
            seeds.append((bench, find_candidate(candidate), kernel, size, rows, configs))


def _at_most(seconds: float, bench: Bench) -> float:
    return min(seconds, bench.seconds_left())


def _row(size: tuple[int, int], rows: int, name: str, kernel: str, **figures: Any) -> Row:
    return {
        **dict.fromkeys(FIELDS, math.nan),
        "shape": f"{size[0]}x{size[1]}", "rows": rows, "name": name, "kernel": kernel, "config": "", "note": "",
        **figures,
    }  # fmt: skip


def _floor_us(candidate: Candidate, size: tuple[int, int], rows: int, bench: Bench) -> float:
    """Microseconds that the layer takes on this GPU at least; nan on a CPU."""
    if bench.device.capability is None:
        return math.nan
    from autoplan.kernels.cuda.gpus import gpu_of

    gpu = gpu_of(bench.device.capability)  # its rates are per microsecond
    rates = floor.Rates(1e6 * gpu.bandwidth, {"bfloat16": 1e6 * gpu.bf16_flops, "int8": 2e6 * gpu.bf16_flops})
    return floor.floor_us(candidate, bench.profile(size, rows), rates)


# -- other libraries -------------------------------------------------------------------------------------------------


Peer = Callable[[nn.Linear], Callable[[Tensor], Tensor]]  # makes what runs in the Linear's place, and may consume it


def _torchao(quantize: Callable[[nn.Module], nn.Module]) -> Peer:
    def make(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        compiled: Callable[[Tensor], Tensor] = torch.compile(quantize(nn.Sequential(linear)))
        return compiled

    return make


def _gemlite(helper: str) -> Peer:
    def make(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        layer: Callable[[Tensor], Tensor] = getattr(
            importlib.import_module("gemlite.helper"), helper
        )(device="cuda:0").from_linear(linear)  # fmt: skip
        return layer

    return make


def _bitsandbytes(kind: str) -> Peer:
    def make(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        bnb = importlib.import_module("bitsandbytes")
        size = (linear.in_features, linear.out_features)
        if kind == "int8":
            layer = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(*size, bias=False, compute_dtype=torch.bfloat16, quant_type=kind)
            layer.weight = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type=kind)
        moved: Callable[[Tensor], Tensor] = layer.cuda()
        return moved

    return make


def _hqq(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    hqq = importlib.import_module("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
    layer: Callable[[Tensor], Tensor] = hqq.HQQLinear(linear, config, compute_dtype=torch.bfloat16, device="cuda")
    return layer


PEERS: dict[str, Peer] = {
    **{name: _torchao(quantize) for name, quantize in whole.TORCHAO.items()},
    "gemlite int8 weight only": _gemlite("A16W8"),
    "gemlite int8 dynamic": _gemlite("A8W8_int8_dynamic"),
    "gemlite fp8 dynamic": _gemlite("A8W8_fp8_dynamic"),
    "bitsandbytes int8": _bitsandbytes("int8"),
    "bitsandbytes nf4": _bitsandbytes("nf4"),
    "hqq int4 g64": _hqq,
}


def peers(bench: Bench, small: bool) -> Iterator[Row]:
    """One row per library's way at a few shapes; where it cannot run, the reason."""
    errors = {name: _import_error(name) for name in dict.fromkeys(peer.partition(" ")[0] for peer in PEERS)}
    missing = {name: error for name, error in errors.items() if error}
    for name, error in missing.items():
        yield {**_row((0, 0), 0, name, "", note=error), "shape": "all"}
    for size, rows in bench.cases:
        if not (small or (rows in PEER_ROWS and f"{size[0]}x{size[1]}" in PEER_SHAPES)):
            continue
        for name, make in PEERS.items():
            if name.partition(" ")[0] in missing:
                continue
            if bench.seconds_left() <= 0:
                yield _row(size, rows, name, "", note="not run: the time was used up")
            else:
                yield _race_peer(bench, size, rows, name, make)


def _import_error(library: str) -> str | None:
    try:
        importlib.import_module(library)
    except Exception as error:  # a library that is broken here is not a reason to stop
        return f"not run: {type(error).__name__}: {error}".partition("\n")[0]
    return None


def _race_peer(bench: Bench, size: tuple[int, int], rows: int, name: str, make: Peer) -> Row:
    """One library's way against F.linear: paired, cold weights, CUDA graphs if that is the mode."""
    device = bench.device.type
    try:
        torch._dynamo.reset()  # noqa: TID251  (each way compiles anew, and none shall meet the recompile limit)
        copies = coldness.copies_on_gpu(2 * size[0] * size[1]) if device == "cuda" else 2
        x = torch.randn(rows, size[1], device=device, dtype=torch.bfloat16)
        plain, theirs = [], []
        for _ in range(copies):
            linear = nn.Linear(size[1], size[0], bias=False, device=device, dtype=torch.bfloat16)
            linear.requires_grad_(False)
            plain.append(functools.partial(F.linear, x, linear.weight.clone()))
            theirs.append(functools.partial(make(linear), x))
        arms = [timing.Arm("plain", "plain", plain), timing.Arm(name, name, theirs)]
        calls, notes = 1, dict[str, str]()
        with torch.inference_mode():
            if device == "cuda" and bench.mode == COMPILED:
                arms, calls, notes = benchmark.on_graphs(arms, "plain")
            timed = timing.race(
                arms,
                baseline="plain",
                max_seconds=bench.seconds_a_race,
                seed=bench.seed,
                clock=timing.clock_of(device),
                min_batch_us=timing.BATCH_US[device],
            )[name]
    except Exception as error:
        return _row(size, rows, name, "", note=f"failed: {type(error).__name__}: {error}".partition("\n")[0])
    baseline_us = timed.baseline_us / calls
    return _row(
        size, rows, name, "", us=timed.ratio * baseline_us, baseline_us=baseline_us, ratio=timed.ratio,
        low=timed.ratio_low, high=timed.ratio_high, note="; ".join(filter(None, (notes.get(name), timed.note))),
    )  # fmt: skip


# -- seeds -----------------------------------------------------------------------------------------------------------


def write_seeds(
    paths: Sequence[Path], found: Sequence[tuple[Bench, Candidate, str, tuple[int, int], int, list[str]]]
) -> None:
    """The configs that won, for planning to try first: entries of these seed files, which keep what else they hold."""
    if not found:
        return
    from autoplan.kernels.cuda import seeds
    from autoplan.kernels.cuda.launch import problem_of

    entries = []
    for bench, candidate, kernel, size, rows, configs in found:
        spec = candidate.spec(bench.profile(size, rows), "bfloat16", bench.device)
        entries.append(seeds.entry(bench.device.name, kernel, problem_of(spec, rows), configs[:4]))
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        seeds.write(path, entries)


if __name__ == "__main__":
    sys.exit(main())
