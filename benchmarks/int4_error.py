"""How far int4 weights are off at how many bits: autoplan's and other libraries', on a real model's layers and inputs.

    python benchmarks/int4_error.py              # needs requirements-peers.txt; a library that is not here is left out

For every Linear of all-MiniLM-L6-v2: the squared error of its output on real text, relative to the output, with the
weight as each library stores it and everything else in float64; of that the geometric mean over the layers. Bits per
weight count whatever is stored: codes, scales, zero points. autoplan's error at the same bits is read off a line
through its own group sizes, in the logarithm (beyond their ends, that line goes on); groups of 16, which are no
candidate, lengthen it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from result_files import folder_of, measured_on, versions, write_csv
from tabulate import tabulate
from torch import Tensor, nn
from workbench.peers import nbytes

from autoplan import demo, kernels, record
from autoplan.cache import fingerprint
from autoplan.kernels import packing
from autoplan.kernels.native import quantize_grouped_fast

GROUPS = (32, 64, 128)
Quantized = tuple[Tensor, int]  # the weight that is stood for [out, in], and the bytes that stand for it
Quantize = Callable[[nn.Linear, int], Quantized]  # of a Linear without bias, in groups of so many


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36, help="the first so many layers (default: all, %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the CSV file (default: benchmarks/results/<device>)")
    arguments = parser.parse_args(argv)
    environment = fingerprint.environment("cpu", fingerprint.source_digest(kernels))
    with torch.no_grad():
        layers = dict(itertools.islice(recorded().items(), arguments.layers))
        rows = [row for name, quantize in LIBRARIES.items() for row in of_library(name, quantize, layers)]
    ours = sorted((row["bits"], math.log(row["error"])) for row in rows if row["library"] == OURS)
    for row in rows:
        if "error" in row:
            row["autoplan_there"] = row["error"] / math.exp(on_line(row["bits"], ours))
    print(tabulate(rows, headers={"autoplan_there": "times autoplan's"}, floatfmt=".3g"))
    out = arguments.out or folder_of(environment)
    write_csv(out / "int4_error.csv", rows, measured_on(environment, **versions("torchao", "optimum-quanto", "hqq")))
    return 0


def recorded() -> Mapping[str, tuple[nn.Linear, Tensor]]:
    """Every Linear of the model, without its bias, and rows of its input."""
    model = demo.load(torch.float32).requires_grad_(False)
    with record(model) as recording:
        for inputs in demo.tokenize(demo.sentences()[:64], 32, 64):
            model(**inputs)
    found = {}
    for name, decision in recording.decisions.items():
        bare = nn.Linear(decision.module.in_features, decision.module.out_features, bias=False)
        bare.weight = nn.Parameter(decision.module.weight.detach().clone(), requires_grad=False)
        found[name] = bare, recording.rows(name).double()
    return found


def of_library(name: str, quantize: Quantize, layers: Mapping[str, tuple[nn.Linear, Tensor]]) -> list[dict[str, Any]]:
    """A row for each size of groups, or the reason why there is none."""
    rows: list[dict[str, Any]] = []
    for group_size in (16, *GROUPS) if name == OURS else GROUPS:
        row: dict[str, Any] = {"library": name, "group": group_size}
        try:
            found = [(linear, x, *quantize(copy.deepcopy(linear), group_size)) for linear, x in layers.values()]
        except Exception as error:
            row["note"] = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        else:
            row["bits"] = 8 * sum(size for *_, size in found) / sum(linear.weight.numel() for linear, *_ in found)
            errors = [relative_error(x, linear.weight, weight) for linear, x, weight, _ in found]
            row["error"] = math.exp(np.mean(np.log(errors)))
        rows.append(row)
    return rows


def relative_error(x: Tensor, weight: Tensor, other: Tensor) -> float:
    y = x @ weight.double().T
    return float((y - x @ other.double().T).square().sum() / y.square().sum())


def on_line(at: float, points: Sequence[tuple[float, float]]) -> float:
    """Through neighbouring points, straight; beyond the ends, through the two there."""
    after = min(max(1, int(np.searchsorted([x for x, _ in points], at))), len(points) - 1)
    (x0, y0), (x1, y1) = points[after - 1 : after + 1]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


# --- libraries ---


def autoplan(linear: nn.Linear, group_size: int) -> Quantized:
    canonical = quantize_grouped_fast(linear.weight, group_size)
    return packing.dequantize(canonical, torch.float32), packing.nbytes(list(canonical.values()))


def torchao(algorithm: str, linear: nn.Linear, group_size: int) -> Quantized:
    """Its int4 for CPUs takes bfloat16 and does not give weights back: they are its products with unit vectors."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_
    from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm

    config = PrototypeInt4WeightOnlyConfig(
        group_size=group_size,
        int4_choose_qparams_algorithm=Int4ChooseQParamsAlgorithm(algorithm),
        set_inductor_config=False,
    )
    quantize_(linear.bfloat16(), config)
    if type(linear.weight) is nn.Parameter:
        raise RuntimeError("quantize_ left the Linear as it was")
    return linear(torch.eye(linear.in_features, dtype=torch.bfloat16)).float().T, nbytes(linear)


def quanto(linear: nn.Linear, group_size: int) -> Quantized:
    from optimum.quanto import QLinear, freeze, qint4

    quantized = QLinear.from_module(linear, weights=qint4)
    quantized.weight_group_size = group_size
    freeze(quantized)
    return quantized.weight.dequantize(), nbytes(quantized)


def hqq(linear: nn.Linear, group_size: int) -> Quantized:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=group_size, axis=1)
    quantized = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
    held = [value for value in (quantized.W_q, *quantized.meta.values()) if isinstance(value, Tensor)]
    return quantized.dequantize(), packing.nbytes(held)


OURS = "autoplan"
LIBRARIES: dict[str, Quantize] = {
    OURS: autoplan,
    "torchao": functools.partial(torchao, "tinygemm"),
    "torchao, HQQ": functools.partial(torchao, "hqq"),
    "quanto": quanto,
    "hqq": hqq,
}


if __name__ == "__main__":
    sys.exit(main())
