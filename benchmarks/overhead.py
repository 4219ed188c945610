"""What calling a layer costs beside its kernel, in eager inference: microseconds a call.

    python benchmarks/overhead.py                # half a minute
    python benchmarks/overhead.py --seconds 0.2  # says nothing

One 64x64 layer at one row, where the kernel takes next to nothing: the layer as a module against its kernel called with
the same tensors and a new one for the output, as F.linear makes one; and a model whose plan is `none` against the model
itself; paired, in one interleaved run.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from result_files import folder_of, measured_on, write_csv
from tabulate import tabulate
from torch import Tensor, nn

from autoplan import Budget, apply_plan, kernels, make_plan, record, timing
from autoplan.cache import fingerprint
from autoplan.candidates import find_candidate
from autoplan.layers import PlannedLinear

PROGRAMS = (("int8_weight_only", "tiled_int8"), ("int8_dynamic", "fused_int8"), ("int4_g32", "tiled_int4"))
SIZE = 64


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of the run (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the CSV file (default: benchmarks/results/<device>)")
    arguments = parser.parse_args(argv)
    environment = fingerprint.environment("cpu", fingerprint.source_digest(kernels))
    with torch.no_grad():
        calls = layers()
        found = timing.compare(
            calls, baseline="F.linear", precision=0.002, max_rounds=400, max_seconds=arguments.seconds, min_batch_us=1e3
        )
    us = {name: found[name].ratio * found[name].baseline_us if name in found else 0.0 for name in calls}
    us["F.linear"] = next(iter(found.values())).baseline_us
    error = {name: (t.ratio_high - t.ratio_low) / 2 * t.baseline_us for name, t in found.items()}
    rows = [
        {"layer": name, "us": value, "+-": error.get(name, 0.0), "beside its kernel": value - us[kernel_of(name)]}
        for name, value in us.items()
        if kernel_of(name) in us
    ]
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    out = arguments.out or folder_of(environment)
    write_csv(out / "overhead.csv", rows, measured_on(environment))
    return 0


def kernel_of(name: str) -> str:
    """What a layer's time is compared with."""
    return "F.linear" if name in ("nn.Linear", "planned, none") else f"kernel of {name}"


def layers() -> dict[str, Callable[[], object]]:
    """Everything that is timed, by name."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE)).requires_grad_(False)
    x = torch.randn(1, SIZE)
    with record(model) as recording:
        for _ in range(3):
            model(torch.randn(1, SIZE))
    plan = make_plan(model, recording, candidates=[], budget=Budget(divergence=0.0), cache=False, compiled=False)
    planned = apply_plan(nn.Sequential(nn.Linear(SIZE, SIZE)).requires_grad_(False), plan, weights="skip")
    calls: dict[str, Callable[[], object]] = {
        "F.linear": functools.partial(F.linear, x, model[0].weight, model[0].bias),
        "nn.Linear": functools.partial(model[0], x),
        "planned, none": functools.partial(planned[0], x),
    }
    for candidate, kernel in PROGRAMS:
        layer = PlannedLinear.from_linear("layer", model[0], find_candidate(candidate), f"1:{kernel}")
        calls[candidate] = functools.partial(layer, x)
        calls[f"kernel of {candidate}"] = functools.partial(call_kernel, kernels.find_kernel(kernel), x, layer)
    return calls


def call_kernel(kernel: kernels.Kernel, x: Tensor, layer: PlannedLinear) -> Tensor:
    if kernel.into is None:
        return kernel.run(x, layer._packed, layer.bias, torch.float32)
    out = torch.empty(1, SIZE)
    kernel.into(out.dtype, layer.bias.dtype, "none")(x, *layer._packed, layer.bias, out=out)
    return out


if __name__ == "__main__":
    sys.exit(main())
