"""Compiled graphs that are for a trial: apart from the user's own, and gone when it is over.

Dynamo keeps graphs by the code object of what it compiled, and that code object by the graphs: neither is freed with
the function. Inductor keeps the modules it wrote; with its freezing on, they hold packed copies of the weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch


def separate(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model as a function with a code object of its own, and so graphs of its own once it is compiled."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    return call


def written() -> Collection[int]:
    """What Inductor has written so far: to tell `forget`."""
    return {id(module) for module in _modules()}


def forget(functions: Iterable[Callable[..., Any]], before: Collection[int]) -> None:
    """Free the graphs of functions that `separate` made, compiled or not, and what Inductor has written since `before`.

    Graphs that are still in use elsewhere go on working: what they call holds what it needs.
    """
    for function in functions:
        separated = getattr(function, "_torchdynamo_orig_callable", function)
        torch._C._dynamo.eval_frame.reset_code(separated.__code__)
    for module in [module for module in _modules() if id(module) not in before]:
        _modules().remove(module)
        sys.modules.pop(module.__name__, None)


def _modules() -> list[Any]:
    codecache = sys.modules.get("torch._inductor.codecache")  # not there: nothing was compiled
    found: list[Any] = codecache.PyCodeCache.modules if codecache else []
    return found
