"""Packed weights in pages of 2 MiB, as the system counts them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from autoplan.kernels import find_kernel, packing, pages
from autoplan.kernels.ops import pack_program


def in_huge_pages(tensor: Tensor) -> int:
    """Bytes in huge pages, of the mappings that hold the tensor."""
    start, stop, found, inside = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            low, high = (int(end, 16) for end in first.split("-"))
            inside = low < stop and start < high
        elif first == "AnonHugePages:" and inside:
            found += int(rest.split()[0]) << 10
    return found


@pytest.fixture
def granted() -> None:
    if not Path("/proc/self/smaps").exists() or not in_huge_pages(pages.settle([torch.ones(16 << 20)])[0]):
        pytest.skip("this system grants no huge pages to memory in use: it is not Linux 6.1, or they are turned off")


@pytest.mark.usefixtures("granted")
def test_a_tensor_is_moved_as_it_is() -> None:
    values = torch.randn(5_000_003)
    before, address = values.clone(), values.data_ptr()
    assert pages.settle((values,)) == (values,)
    assert values.data_ptr() == address
    assert torch.equal(values, before)
    assert in_huge_pages(values) >= values.nbytes - 2 * pages.HUGE  # an end may share a page with no memory


@pytest.mark.usefixtures("granted")
def test_what_a_layer_holds_is_moved() -> None:
    canonical = packing.quantize_per_channel(torch.randn(4096, 4096), torch.int8)
    (codes, _) = pack_program("1:int_mm", canonical)
    assert in_huge_pages(codes) >= codes.nbytes - 2 * pages.HUGE


def test_what_has_no_memory_of_the_cpu_is_left_alone() -> None:
    weight = torch.randn(512, 512)
    others = [torch.empty(1 << 20, device="meta"), torch.empty(0), torch.nn.Parameter(weight)]
    if find_kernel("onednn").lacks() is None:
        others.append(torch.ops.mkldnn._reorder_linear_weight(weight, None))
    assert pages.settle(others) is others


def test_who_wants_no_huge_pages_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages.Path, "exists", lambda path: True)
    monkeypatch.setattr(pages.Path, "read_text", lambda path: "always madvise [never]\n")
    assert pages._collapse.__wrapped__() is None
    monkeypatch.setattr(pages, "_collapse", lambda: None)
    assert pages.settle([torch.ones(1 << 20)])[0].sum() == 1 << 20
