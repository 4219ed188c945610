"""The files that benchmarks write: in which folder, and what every row says it was measured on."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_COLUMNS = ("device", "driver", "cuda", "python", "torch", "triton", "kernels")  # driver and cuda: of a GPU


def folder_of(environment: Mapping[str, Any]) -> Path:
    """benchmarks/results/<device>, the device as fingerprints name it."""
    return Path(__file__).parent / "results" / re.sub(r"[^a-z0-9]+", "-", str(environment["device"]).lower()).strip("-")


def measured_on(environment: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The columns that every row ends with: device, versions, threads, `more`, and the date."""
    known = {column: environment[column] for column in _COLUMNS if column in environment}
    return known | {"threads": torch.get_num_threads(), **more, "date": datetime.date.today().isoformat()}


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each package, or "none"."""
    installed = {}
    for package in packages:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = "none"
    return installed


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """The rows, which may differ in their columns, each followed by `about`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*dict.fromkeys(key for row in rows for key in row), *about])
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)
