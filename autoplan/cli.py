"""The `autoplan` command. Libraries are imported by the subcommands that need them, so that --help is quick."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autoplan.errors import AutoplanError

if TYPE_CHECKING:
    from autoplan.candidates import Candidate
    from autoplan.kernels import Kernel
    from autoplan.records import Device, LayerProfile
    from autoplan.selection import Budget

_EXIT_CODES = """\
exit codes:
  0  done
  1  demo: the planned model's error is above the budget
     plan: no layer was switched, the plan is the float model
     cache verify: something cannot be trusted; cache show: there is no such record
  2  wrong usage, or an error that the message explains (or a traceback)
  130  interrupted
"""
_DTYPES = ("float32", "bfloat16", "float16")
_TYPICAL = 4096  # in_features and out_features of the layer that `doctor` asks about
_LARGEST_MULTIPLE = 256
_ARCHITECTURES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default the process's own) and return its exit code."""
    try:
        arguments = _parser().parse_args(argv)
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except AutoplanError as error:
        print(f"autoplan: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("autoplan: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `autoplan report plan.json | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        traceback.print_exc()  # to be reported; not 1, which is an answer
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    import autoplan
    from autoplan import cli_cache, cli_plan

    parser = argparse.ArgumentParser(
        prog="autoplan",
        description="Picks, for every Linear of a PyTorch model, the fastest quantized kernel inside a stated budget.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"autoplan {autoplan.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = _command(commands, "demo", "plan a real sentence encoder and measure what that gained", _demo)
    demo.add_argument(
        "--dtype", choices=("float32", "bfloat16", "both"), default="both",
        help="dtype that the model is given in (default: %(default)s)",
    )  # fmt: skip
    demo.add_argument(
        "--batch", type=_positive, default=32, metavar="N", help="sentences per batch (default: %(default)s)"
    )
    demo.add_argument(
        "--budget", default="high", metavar="BUDGET",
        help="lossless, high or balanced, or the largest relative squared error of the embeddings (default: high)",
    )  # fmt: skip
    cache = demo.add_mutually_exclusive_group()
    cache.add_argument("--cache", metavar="PATH", help="cache folder, .json or .pkl file (default: the user's own)")
    cache.add_argument("--fresh", action="store_true", help="measure and plan anew, and keep nothing")
    demo.add_argument("--json", action="store_true", help="all figures as JSON; progress goes to stderr")

    report = _command(commands, "report", "show a saved plan", _report)
    report.add_argument("file", metavar="FILE", help="what plan.save() wrote: .json or .pkl")
    shape = report.add_mutually_exclusive_group()
    shape.add_argument("--format", choices=("text", "markdown", "csv", "json"), default="text")
    shape.add_argument("--json", action="store_const", const="json", dest="format", help="the same as --format json")

    doctor = _command(commands, "doctor", "show what this machine supports, and why not the rest", _doctor)
    doctor.add_argument("--json", action="store_true", help="the same as JSON")

    cli_plan.add(commands, _command, _positive, _budget)
    cli_cache.add(commands, _command)
    return parser


def _command(commands: Any, name: str, summary: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text!r}")
    return int(text)


def _budget(text: str) -> Budget | str:
    """A preset's name as it is, a number as a budget for the divergence."""
    from autoplan.selection import Budget

    try:
        limit = float(text)
    except ValueError:
        return text
    return Budget(divergence=limit)


# -- autoplan demo, autoplan report --------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> int:
    from autoplan import demo
    from autoplan.cache.store import PlanCache

    def say(text: str) -> None:
        print(text, file=sys.stderr if arguments.json else sys.stdout, flush=True)

    figures = demo.run(
        dtypes=("float32", "bfloat16") if arguments.dtype == "both" else (arguments.dtype,),
        batch=arguments.batch,
        budget=_budget(arguments.budget),
        cache=PlanCache() if arguments.fresh else arguments.cache,
        say=say,
    )
    if arguments.json:
        print(json.dumps(figures, indent=2))
    return 0 if all(planned["within_budget"] for planned in figures["planned"].values()) else 1


def _report(arguments: argparse.Namespace) -> int:
    from autoplan.plan import Plan

    print(Plan.load(arguments.file).report(arguments.format))
    return 0


# -- autoplan doctor -----------------------------------------------------------------------------------------------


def _doctor(arguments: argparse.Namespace) -> int:
    found = examine()
    print(json.dumps(found, indent=2) if arguments.json else _doctor_text(found))
    return 0


def examine() -> dict[str, Any]:
    """What this machine supports, as plain data: environment, tools, and every candidate x kernel x model dtype.

    And what any GPU would: every CUDA kernel x architecture.
    """
    import torch

    import autoplan
    from autoplan import kernels
    from autoplan.cache import fingerprint
    from autoplan.cache.store import PlanCache

    kernels_digest = fingerprint.source_digest(kernels)
    cache = PlanCache.default()
    found: dict[str, Any] = {
        "autoplan": autoplan.__version__,
        "compiler": _compiler(),
        "cache": {"path": str(cache.path), "records": len(cache)},
        "typical_layer": [_TYPICAL, _TYPICAL],
        "devices": [],
        "cuda_kernels": _cuda_kernels(),
    }
    for device_type in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        environment = fingerprint.environment(device_type, kernels_digest)
        found["devices"].append({"environment": environment, "candidates": _candidates(device_type, environment)})
    return found


def _compiler() -> str | None:
    """The C++ compiler that `torch.compile` would use on a CPU, by its name."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
    return next((name for name in names if name and shutil.which(name)), None)


def _candidates(device_type: str, environment: dict[str, Any]) -> list[dict[str, Any]]:
    from autoplan.candidates import registered
    from autoplan.kernels import find_kernel
    from autoplan.records import Device

    capability, features = environment.get("capability"), environment.get("features", ())
    device = Device(
        device_type,
        environment["device"],
        capability=(int(capability[0]), int(capability[1])) if device_type == "cuda" and capability else None,
        features=tuple(features),
    )
    rows = []
    for candidate in registered():
        for kernel in map(find_kernel, candidate.kernels):
            if device_type not in kernel.devices:
                continue
            reasons = {dtype: _rejects(candidate, kernel, device, dtype) for dtype in _DTYPES}
            rows.append(
                {
                    "candidate": candidate.name,
                    "kernel": kernel.name,
                    "available": {dtype: not reason for dtype, reason in reasons.items()},
                    "reasons": {dtype: reason for dtype, reason in reasons.items() if reason},
                    "in_features_multiple_of": _multiple(candidate, kernel, device, "in_features"),
                    "out_features_multiple_of": _multiple(candidate, kernel, device, "out_features"),
                    "recipe": _first_sentence(candidate),
                }
            )
    return rows


def _rejects(candidate: Candidate, kernel: Kernel, device: Device, dtype: str, **size: int) -> str | None:
    """Why a 4096x4096 layer (or one of another `size`) of a model in `dtype` cannot run on this kernel, or None."""
    profile = _profile(dtype, device.type, **size)
    return candidate.rejects(profile, device) or kernel.rejects(candidate.spec(profile, dtype, device))


def _cuda_kernels() -> list[dict[str, Any]]:
    """Which GPU architectures each CUDA kernel supports for a 4096x4096 layer in bfloat16, and why not the others.

    By what kernels and candidates say of themselves: no GPU is asked, so a machine may still lack what a kernel needs.
    """
    from autoplan.candidates import registered
    from autoplan.kernels import find_kernel
    from autoplan.records import Device

    served: dict[str, list[Candidate]] = {}
    for candidate in registered():
        for name in candidate.kernels:
            if "cuda" in find_kernel(name).devices:
                served.setdefault(name, []).append(candidate)
    profile = _profile("bfloat16", "cuda")
    rows = []
    for name, candidates in served.items():
        supported, reasons = {}, {}
        for capability in _ARCHITECTURES:
            architecture = "sm_{}{}".format(*capability)
            device = Device("cuda", architecture, capability)
            found = [
                candidate.rejects(profile, device)
                or find_kernel(name).supports(candidate.spec(profile, "bfloat16", device))
                for candidate in candidates
            ]
            supported[architecture] = not all(found)
            if all(found):
                reasons[architecture] = found[0]
        rows.append(
            {
                "kernel": name,
                "candidates": [candidate.name for candidate in candidates],
                "supported": supported,
                "reasons": reasons,
            }
        )
    return rows


def _profile(dtype: str, device: str, in_features: int = _TYPICAL, out_features: int = _TYPICAL) -> LayerProfile:
    from autoplan.records import Call, LayerProfile

    calls = (Call("default", 1, dtype, 1),)
    return LayerProfile("layer", (), in_features, out_features, True, dtype, device, calls)


def _multiple(candidate: Candidate, kernel: Kernel, device: Device, side: str) -> int | None:
    """What in_features or out_features must be a multiple of, found by asking; None if nothing helps."""
    dtype = next((dtype for dtype in _DTYPES if not _rejects(candidate, kernel, device, dtype)), None)
    multiple = 1
    while dtype and multiple <= _LARGEST_MULTIPLE:
        if not _rejects(candidate, kernel, device, dtype, **{side: _TYPICAL + multiple}):
            return multiple
        multiple *= 2
    return None


def _first_sentence(candidate: Candidate) -> str:
    return (type(candidate).__doc__ or "").strip().partition("\n")[0].rstrip(".")


def _doctor_text(found: dict[str, Any]) -> str:
    from tabulate import tabulate

    lines = [f"autoplan {found['autoplan']}", ""]
    for device in found["devices"]:
        environment = device["environment"]
        lines += [f"  {name.replace('_', ' '):<15}{_words(value)}" for name, value in environment.items()]
        missing = "none found: torch.compile and our own kernels will not work on this CPU, torch's in eager mode will"
        lines += [f"  {'C++ compiler':<15}{found['compiler'] or missing}"]
        lines += [f"  {'cache':<15}{found['cache']['path']} ({found['cache']['records']} records)", ""]
        rows, reasons, recipes = [], [], {}
        for row in device["candidates"]:
            marks = ["yes" if row["available"][dtype] else "no" for dtype in _DTYPES]
            rows.append(
                ["" if row["candidate"] in recipes else row["candidate"], row["kernel"], *marks, _size_rule(row)]
            )
            recipes[row["candidate"]] = row["recipe"]
            for reason in dict.fromkeys(row["reasons"].values()):
                dtypes = [dtype for dtype, own in row["reasons"].items() if own == reason]
                where = "" if len(dtypes) == len(_DTYPES) else f" ({', '.join(dtypes)})"
                reasons.append(f"  {row['candidate']} on {row['kernel']}{where}: {reason}")
        size = "x".join(map(str, found["typical_layer"]))
        lines += [
            f"Kernels for a {size} layer by the model's dtype, and the sizes they want; a plan times them and picks:"
        ]
        lines += ["", tabulate(rows, ["candidate", "kernel", *_DTYPES, "sizes"], disable_numparse=True), ""]
        lines += ["Candidates:", *(f"  {name:<16}  {recipe}" for name, recipe in recipes.items()), ""]
        if reasons:
            lines += ["Why not:", *reasons, ""]
    lines += _cuda_kernels_text(found["cuda_kernels"], size)
    return "\n".join(line.rstrip() for line in "\n".join(lines).rstrip().splitlines())


def _cuda_kernels_text(kernels: list[dict[str, Any]], size: str) -> list[str]:
    from tabulate import tabulate

    rows, reasons = [], []
    for row in kernels:
        marks = ["yes" if supported else "no" for supported in row["supported"].values()]
        rows.append([row["kernel"], *marks, ", ".join(row["candidates"])])
        for reason in dict.fromkeys(row["reasons"].values()):
            where = [architecture for architecture, own in row["reasons"].items() if own == reason]
            reasons.append(f"  {row['kernel']} ({', '.join(where)}): {reason}")
    headers = ["kernel", *kernels[0]["supported"], "candidates"]
    lines = [f"CUDA kernels by architecture, for a {size} layer in bfloat16 (whatever GPU is here):", ""]
    lines += [tabulate(rows, headers, disable_numparse=True), ""]
    return [*lines, "Why not:", *reasons, ""] if reasons else lines


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else "none" if value is None else str(value)


def _size_rule(row: dict[str, Any]) -> str:
    rules = []
    for side in ("in_features", "out_features"):
        multiple = row[f"{side}_multiple_of"]
        if multiple and multiple > 1:
            rules.append(f"{side} % {multiple} = 0")
    return ", ".join(rules) or ("any" if any(row["available"].values()) else "-")


if __name__ == "__main__":
    raise SystemExit(main())
