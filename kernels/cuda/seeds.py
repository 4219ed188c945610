"""Measured configurations that ship with the package: those the model's guesses come after.

`seeds.json` holds, per GPU, kernel and problem, the best configurations that a benchmark measured, fastest first. An
entry made on an "NVIDIA H200" goes for that card; one for "sm_90" for every card of that capability without its own.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from autoplan.errors import KernelError
from autoplan.kernels.cuda.space import Problem

_FORMAT = 1
_KEY = ("gpu", "kernel", "n", "k", "group_size", "dtype", "rows")
Entry = dict[str, Any]


def entry(gpu: str, kernel: str, problem: Problem, configs: Iterable[str]) -> Entry:
    """One line of the table: `configs`, fastest first, for one kernel and problem on the GPU of that name."""
    return {**_key(gpu, kernel, problem), "configs": list(configs)}


def find(
    kernel: str, problem: Problem, gpu: str | None = None, table: Mapping[str, list[str]] | None = None
) -> list[str]:
    """The configurations measured for a problem on the card `gpu`, else on its generation; often none."""
    table = _shipped() if table is None else table
    for name in (gpu, "sm_{}{}".format(*problem.capability)):
        if name is not None and (found := table.get(_text(_key(name, kernel, problem)))):
            return found
    return []


def read(text: str) -> dict[str, list[str]]:
    """The table that a seed file's text holds, by key. Raises KernelError when it is none."""
    try:
        data = json.loads(text)
        if data["format"] != _FORMAT:
            raise KernelError(f"seed format {data['format']!r} is not {_FORMAT}")
        return {_text(line): list(line["configs"]) for line in data["entries"]}
    except (ValueError, KeyError, TypeError) as error:
        raise KernelError(f"this is no table of measured configurations: {error}") from error


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Put `entries` into the seed file at `path`; what it held for the same problem is replaced, the rest stays."""
    held = json.loads(path.read_text(encoding="utf-8"))["entries"] if path.exists() else []
    merged = {_text(line): line for line in [*held, *entries]}
    lines = ",\n".join(f"    {json.dumps(merged[key])}" for key in sorted(merged))
    body = f'{{\n  "format": {_FORMAT},\n  "entries": [{f"{chr(10)}{lines}{chr(10)}  " if lines else ""}]\n}}\n'
    path.write_text(body, encoding="utf-8")


def _key(gpu: str, kernel: str, problem: Problem) -> dict[str, Any]:
    return {
        "gpu": gpu,
        "kernel": kernel,
        "n": problem.n,
        "k": problem.k,
        "group_size": problem.group_size,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "rows": problem.m,
    }


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps([line[name] for name in _KEY])


@functools.cache
def _shipped() -> dict[str, list[str]]:
    return read(resources.files(__package__).joinpath("seeds.json").read_text(encoding="utf-8"))
