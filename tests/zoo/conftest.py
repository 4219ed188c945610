"""Puts `animals` within reach of the tests beside it, and keeps planning them short."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module", autouse=True)
def brisk() -> Iterator[None]:
    """Layers so small leave nothing for a second thread to do, and need no copies to leave the caches."""
    from autoplan import coldness

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coldness, "MAX_COPIES", 2)
        yield
    torch.set_num_threads(threads)
