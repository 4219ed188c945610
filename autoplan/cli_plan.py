"""`autoplan plan` and `autoplan apply`: from a model and its inputs to a plan, and from a plan to planned weights.

A server needs the two files that `apply` writes, and the code that builds the float model:

    with torch.device("meta"):  # no memory, no time; leave it out where the model has buffers that no file holds
        model = build()
    apply_plan(model, Plan.load("planned/plan.json"), weights="skip")
    model.load_state_dict(safetensors.torch.load_file("planned/model.safetensors"), assign=True)
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoplan.errors import AutoplanError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autoplan.plan import Plan

_DTYPES = ("float32", "bfloat16", "float16")
_MODEL = "a folder with a transformers model, or module:function, called without arguments for a model"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
_NO_FOLDERS = (*_WEIGHTS[1:], ".json", ".pkl")  # nobody means a folder by a name that ends so

AddCommand = Callable[[Any, str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]


def add(commands: Any, command: AddCommand, positive: Callable[[str], int], budget: Callable[[str], Any]) -> None:
    """Add `plan` and `apply` to the parsers of `commands`; `command` makes one."""
    parser = command(commands, "plan", "plan a model on inputs in a file, and save the plan", _plan)
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument(
        "--inputs", metavar="FILE", required=True,
        help="what to run the model on: .pt (a tensor, a tuple, a mapping, or a list of these: batches), .safetensors, "
        ".npz (by the names of arguments), .npy, .json (the same as .pt, tensors as lists), .txt (a text per line, for "
        "a transformers folder with a tokenizer)",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE", required=True, help="path or URL of the plan, .json or .pkl")
    parser.add_argument(
        "--budget", type=budget, default="high", metavar="BUDGET",
        help="lossless, high or balanced, or the largest divergence: KL in nats per token of logits, else relative "
        "squared error (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--candidates", type=_names, metavar="NAMES", help="such as int8_dynamic,bf16 (default: all)")
    parser.add_argument("--include", action="append", metavar="GLOB", help="plan only layers of such names; repeatable")
    parser.add_argument("--exclude", action="append", metavar="GLOB", help="leave layers of such names; repeatable")
    parser.add_argument(
        "--compiled", action="store_true", help="plan for a model that will run under torch.compile (default: eager)"
    )
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="texts per batch (default: %(default)s)")
    parser.add_argument("--max-seconds", type=float, metavar="S", help="stop measuring after about this long")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (default: %(default)s)")
    parser.add_argument("--strict", action="store_true", help="digest every byte of the weights, not a sample")
    parser.add_argument("--no-autocast", action="store_true", help="keep what is between the layers in float32")
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument(
        "--cache", metavar="PLACE", help="a folder, a .json or .pkl file, or a URL (default: the user's)"
    )
    cache.add_argument("--fresh", action="store_true", help="measure and plan anew, and keep nothing")
    _add_common(parser)

    parser = command(commands, "apply", "quantize a model as a plan says, and save its weights", _apply)
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("plan", metavar="PLAN", help="path or URL of the plan")
    parser.add_argument(
        "--out", metavar="OUT", required=True,
        help="a folder, for model.safetensors, plan.json and the small files of the model's own folder; or a "
        "FILE.safetensors, with FILE.plan.json beside it",
    )  # fmt: skip
    parser.add_argument(
        "--weights", choices=("check", "strict", "skip"), default="check",
        help="whether the weights must be those that were planned (default: %(default)s)",
    )  # fmt: skip
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=_DTYPES, help="cast the model (default: as it comes)")
    parser.add_argument("--device", default="cpu", help="where the model runs, such as cuda (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="what was done as JSON; progress goes to stderr")


def _plan(arguments: argparse.Namespace) -> int:
    from autoplan.planner import make_plan
    from autoplan.recorder import as_calls, record

    _check_suffix(arguments.out, (".json", ".pkl"))
    if "://" not in arguments.out:
        _make_folder(Path(arguments.out).parent)  # now, not once all is measured
    inputs = _inputs(arguments.inputs, arguments.model, arguments.batch)
    model = _load(arguments.model, arguments.dtype, arguments.device)
    inputs = _moved(inputs, arguments.device)
    calls = as_calls(inputs)
    with record(model, seed=arguments.seed) as recording, _no_grad():
        for args, kwargs in calls:
            _run(model, args, kwargs, arguments.inputs)
    plan = make_plan(
        model,
        recording,
        budget=arguments.budget,
        candidates=arguments.candidates,
        include=arguments.include,
        exclude=arguments.exclude,
        compiled=arguments.compiled,
        cache=False if arguments.fresh else arguments.cache,
        max_seconds=arguments.max_seconds,
        seed=arguments.seed,
        strict=arguments.strict,
        autocast=not arguments.no_autocast,
    )
    plan.save(arguments.out)
    if arguments.json:
        print(json.dumps({"plan": arguments.out, **_summary(plan)}, indent=2))
    else:
        print(plan.report())
        print(f"\nsaved to {arguments.out}")
    return 0 if _summary(plan)["switched"] else 1


def _apply(arguments: argparse.Namespace) -> int:
    from autoplan.apply import apply_plan, plan_of
    from autoplan.plan import Plan

    plan = Plan.load(arguments.plan)
    out = Path(arguments.out)
    if out.suffix in _NO_FOLDERS and not out.is_dir():
        raise AutoplanError(
            f"--out {arguments.out}: planned weights go to a folder, or to a file ending in .safetensors"
        )
    in_folder = out.suffix != ".safetensors"  # a folder may be named Llama-3.2-1B
    weights = out / "model.safetensors" if in_folder else out
    plan_file = out / "plan.json" if in_folder else out.with_suffix(".plan.json")
    in_the_models = os.path.isdir(arguments.model) and weights.resolve().parent == Path(arguments.model).resolve()
    if in_the_models and (in_folder or weights.exists()):
        raise AutoplanError(f"--out {arguments.out}: that would write over the float model; choose another place")
    model = apply_plan(_load(arguments.model, arguments.dtype, arguments.device), plan, weights=arguments.weights)
    applied = plan_of(model)
    _make_folder(weights.parent)
    try:
        nbytes = _save_weights(model, weights)
        copied = list(_copy_small_files(Path(arguments.model), out)) if in_folder else []
    except OSError as error:
        raise AutoplanError(f"cannot write {arguments.out}: {error}") from error
    plan.save(plan_file)
    if arguments.json:
        done = {"weights": str(weights), "plan": str(plan_file), "copied": copied, "nbytes": nbytes}
        print(json.dumps({**done, "stale": list(applied.stale), **_summary(plan)}, indent=2))
    else:
        switched = _summary(plan)["switched"]
        print(f"{switched} of {len(plan.layers)} layers changed; {nbytes / 1e6:.1f} MB written to {weights}, the plan")
        print(f"to {plan_file}. To load them: build the float model, apply_plan(model, plan, weights='skip'), then")
        print("model.load_state_dict(safetensors.torch.load_file(...), assign=True)")
    return 0


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AutoplanError(f"cannot write to {folder}: {error}") from error


def _summary(plan: Plan) -> dict[str, Any]:
    """What a script wants to know of a plan."""
    from collections import Counter
    from dataclasses import asdict

    from autoplan.selection import is_plain

    outcome = plan.outcome
    return {
        "layers": len(plan.layers),
        "switched": sum(not is_plain(layer) for layer in plan.layers),
        "left_alone": len(plan.left_alone),
        "candidates": dict(sorted(Counter(layer.chosen for layer in plan.layers).items())),
        "budget": asdict(plan.budget),
        "speedup": outcome and outcome.speedup and asdict(outcome.speedup),
        "divergence": outcome and asdict(outcome.divergence),
        "nbytes_of_layers": [plan.baseline_nbytes, plan.nbytes],
        "notes": list(outcome.notes) if outcome else [],
        "seconds": plan.planning_seconds.get("total"),
    }


# -- the model -------------------------------------------------------------------------------------------------------


def _load(name: str, dtype: str | None, device: str) -> nn.Module:
    """The model that MODEL names, in eval mode, on its device. Raises AutoplanError saying what is wrong with it."""
    import torch
    from torch import nn

    if os.path.isdir(name):
        model = _from_folder(Path(name))
    elif ":" in name and not os.path.exists(name):
        model = _from_function(name)
    else:
        raise AutoplanError(f"MODEL {name!r} is neither a folder nor module:function")
    if not isinstance(model, nn.Module):
        raise AutoplanError(f"{name} gave a {type(model).__name__}, not an nn.Module")
    try:
        return model.eval().to(device=torch.device(device), dtype=getattr(torch, dtype) if dtype else None)
    except (RuntimeError, AssertionError) as error:  # no such device, not compiled with CUDA, out of memory
        raise AutoplanError(f"cannot put the model on {device}: {error}") from error


def _from_function(name: str) -> Any:
    module_name, _, function_name = name.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)  # as `python -m` has it, also for what the function imports
    try:
        try:
            found: Any = importlib.import_module(module_name)
            for part in function_name.split("."):
                found = getattr(found, part)
        except Exception as error:  # also of the module's own code
            raise AutoplanError(f"cannot import {name}: {type(error).__name__}: {error}") from error
        if not callable(found):
            raise AutoplanError(f"{name} is a {type(found).__name__}; it must be a function that returns the model")
        try:
            return found()
        except Exception as error:
            raise AutoplanError(f"{name}() failed: {type(error).__name__}: {error}") from error
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _from_folder(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise AutoplanError(f"{folder} holds no config.json, so it is no transformers model")
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], transformers.AutoModel)
        return named.from_pretrained(folder, local_files_only=True, dtype="auto")
    except Exception as error:
        raise AutoplanError(f"transformers cannot load {folder}: {type(error).__name__}: {error}") from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise AutoplanError("a model folder needs transformers: pip install transformers") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


# -- the inputs ------------------------------------------------------------------------------------------------------


def _inputs(file: str, model: str, batch: int) -> Any:
    """What FILE holds, in the form that `autoplan` takes example_inputs in. Raises AutoplanError."""
    readers: dict[str, Callable[[str], Any]] = {
        ".pt": _read_pt,
        ".pth": _read_pt,
        ".safetensors": _read_safetensors,
        ".npz": _read_numpy,
        ".npy": _read_numpy,
        ".json": _read_json,
        ".txt": lambda path: _read_texts(path, model, batch),
    }
    suffix = os.path.splitext(file)[1]
    _check_suffix(file, tuple(readers))
    try:
        return readers[suffix](file)
    except AutoplanError:
        raise
    except Exception as error:  # each format has errors of its own
        raise AutoplanError(f"cannot read the inputs in {file}: {type(error).__name__}: {error}") from error


def _read_pt(file: str) -> Any:
    import torch

    return torch.load(file, weights_only=True, map_location="cpu")


def _read_safetensors(file: str) -> Any:
    from safetensors.torch import load_file

    return load_file(file)


def _read_numpy(file: str) -> Any:
    import numpy as np
    import torch

    found = np.load(file, allow_pickle=False)
    if isinstance(found, np.ndarray):
        return torch.from_numpy(found)
    return {name: torch.from_numpy(found[name]) for name in found.files}


def _read_json(file: str) -> Any:
    """A mapping is one batch by the names of arguments; a list of mappings is batches; nested lists are a tensor."""
    import torch

    with open(file, encoding="utf-8") as opened:
        found = json.load(opened)

    def batch(item: Any) -> Any:
        if isinstance(item, dict):
            return {name: torch.tensor(value) if isinstance(value, list) else value for name, value in item.items()}
        return torch.tensor(item)

    if isinstance(found, list) and found and all(isinstance(item, dict) for item in found):
        return [batch(item) for item in found]
    return batch(found)


def _read_texts(file: str, model: str, batch: int) -> Any:
    if not os.path.isdir(model):
        raise AutoplanError(f"{file} holds texts: these need the tokenizer of a transformers folder as MODEL")
    texts = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise AutoplanError(f"{file} holds no text")
    tokenizer = _transformers().AutoTokenizer.from_pretrained(model, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return [
        dict(tokenizer(texts[start : start + batch], padding=True, truncation=True, return_tensors="pt"))
        for start in range(0, len(texts), batch)
    ]


def _moved(data: Any, device: str) -> Any:
    """The inputs with every tensor on the device."""
    from torch import Tensor
    from torch.utils._pytree import tree_map

    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, data)


def _run(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], file: str) -> None:
    try:
        model(*args, **kwargs)
    except Exception as error:
        raise AutoplanError(
            f"the model does not run on the inputs in {file}: {type(error).__name__}: {error}"
        ) from error


def _no_grad() -> Any:
    import torch

    return torch.no_grad()


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _check_suffix(file: str, known: Sequence[str]) -> None:
    if os.path.splitext(file)[1] not in known:
        raise AutoplanError(f"{file}: its suffix must be one of {', '.join(known)}")


# -- the planned weights ---------------------------------------------------------------------------------------------


def _save_weights(model: nn.Module, file: Path) -> int:
    """Write the state of the model; returns its bytes. What shares memory is written once for each name."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise AutoplanError('planned weights need safetensors: pip install "autoplan[weights]"') from error
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        own = tensor.detach().cpu().contiguous()
        state[name] = own.clone() if own.untyped_storage().data_ptr() in seen or own.storage_offset() else own
        seen.add(state[name].untyped_storage().data_ptr())
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        save_file(state, temporary, metadata={"format": "pt"})
        os.replace(temporary, file)  # a file that is there stays whole if this fails
    finally:
        temporary.unlink(missing_ok=True)
    return file.stat().st_size


def _copy_small_files(source: Path, target: Path) -> Iterator[str]:
    """Copy the configuration, the tokenizer and the like of a model's folder; yields their names."""
    if not source.is_dir() or source.resolve() == target.resolve():
        return
    for file in sorted(source.iterdir()):
        is_weights = file.suffix in _WEIGHTS or file.name.endswith(".index.json") or file.name == "plan.json"
        if file.is_file() and not is_weights:
            shutil.copyfile(file, target / file.name)
            yield file.name
