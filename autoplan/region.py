"""A model that enters a region of autocast by itself, and what its layers are given there."""

from __future__ import annotations

import inspect
import threading
from dataclasses import replace
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from autoplan.divergence import call, undisturbed
from autoplan.recorder import Recording, recorded

DTYPE = "bfloat16"  # that regions are tried with


class Region:
    """Stands in for the `forward` of a float32 module: that, in a region of autocast, what it gives in float32 again.

    It is an attribute of the module, and so is copied, pickled and saved with it.
    """

    def __init__(self, module: nn.Module, device_type: str, dtype: str) -> None:
        self.module, self.device_type, self.dtype = module, device_type, getattr(torch, dtype)
        self.inner = vars(module).get("forward")  # where somebody else has put one there

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device_type, self.dtype):
            if self.inner is None:
                result = type(self.module).forward(self.module, *args, **kwargs)
            else:
                result = self.inner(*args, **kwargs)
        return tree_map(self._widened, result)

    def _widened(self, leaf: Any) -> Any:
        return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype == self.dtype else leaf

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the module's own forward, which callers look at to know what they may give."""
        own = inspect.signature(self.inner or type(self.module).forward)
        skipped = 0 if self.inner else 1  # self
        return own.replace(parameters=list(own.parameters.values())[skipped:])

    @property
    def __code__(self) -> CodeType:
        """Likewise: torch.export looks there for where it is written."""
        code: CodeType = (self.inner or type(self.module).forward).__code__
        return code


def recorded_inside(model: nn.Module, recording: Recording) -> Recording:
    """What the recorded inputs make layers see in a region of autocast; as inputs they stay outside of it.

    For a model in which the recording's layers have their names: that itself, or a copy.
    """
    there = Recording(model, recording.seed, only_thread=threading.get_ident())
    with recorded(there), undisturbed(model):
        for item in recording.inputs:
            with there.workload(item.workload, recording.weights[item.workload]):
                call(model, replace(item, autocast=DTYPE))
    there.inputs, there.inputs_dropped = list(recording.inputs), recording.inputs_dropped
    return there
