"""A model that enters a region of autocast by itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from autoplan.records import Autocast


def size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How large a call is: the elements of the smallest tensor of two or more dimensions in it, 0 where there is none.

    Of a language model these are its tokens, whatever masks and caches of earlier ones come with them.
    """
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    sizes = [tensor.numel() for tensor in tensors if tensor.dim() > 1 and tensor.numel() > 0]
    return min(sizes) if sizes else 0


def enters(autocast: Autocast, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a model enters its region in this call."""
    return autocast.least == 0 or size(args, kwargs) >= autocast.least


class Region:
    """Stands in for the `forward` of a float32 module: that, in a region of autocast, what it gives in float32 again.

    It is an attribute of the module, and so is copied, pickled and saved with it.
    """

    def __init__(self, module: nn.Module, autocast: Autocast) -> None:
        self.module, self.autocast, self.dtype = module, autocast, getattr(torch, autocast.dtype)
        self.inner = vars(module).get("forward")  # where somebody else has put one there

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not enters(self.autocast, args, kwargs):
            return self._own(*args, **kwargs)
        with torch.autocast(self.autocast.device_type, self.dtype):
            result = self._own(*args, **kwargs)
        return tree_map(self._widened, result)

    def _own(self, *args: Any, **kwargs: Any) -> Any:
        if self.inner is None:
            return type(self.module).forward(self.module, *args, **kwargs)
        return self.inner(*args, **kwargs)

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
