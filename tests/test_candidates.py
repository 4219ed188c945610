"""The contract that every registered candidate keeps; a new candidate is covered without a further line here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoplan.candidates import Candidate, base, find_candidate, registered
from autoplan.errors import CandidateError
from autoplan.kernels import packing
from autoplan.kernels.reference import relative_error
from autoplan.records import Call, Device, LayerProfile

CPU = Device("cpu", "cpu")
SQNR_FLOOR = {"none": 1e-6, "bf16": 5e-3, "int8_weight_only": 0.012, "int8_dynamic": 0.02}
SQNR_FLOOR |= {"int6_dynamic_g64": 0.04, "int5_dynamic_g64": 0.06}


def profile(k: int, n: int, dtype: str) -> LayerProfile:
    return LayerProfile("layer", (), k, n, True, dtype, "cpu", (Call("default", 4, dtype, 1),))


def names() -> list[str]:
    return [candidate.name for candidate in registered()]


def test_none_comes_first_and_order_is_fixed() -> None:
    assert names() == ["none", *sorted(set(names()) - {"none"})]
    assert {"bf16", "int8_weight_only", "int8_dynamic", "int4_g32", "int4_g64", "int4_g128"} <= set(names())
    assert {"fp8_weight_only", "fp8_dynamic"} <= set(names())


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("k", "n"), [(4, 1), (20, 17), (96, 33), (128, 48), (300, 8), (1000, 33)])
def test_runs_close_to_its_meaning_or_says_why_not(name: str, dtype: str, k: int, n: int) -> None:
    candidate = find_candidate(name)
    layer = profile(k, n, dtype)
    kernels, reasons = candidate.usable_kernels(layer, CPU)
    reason = candidate.rejects(layer, CPU) or (None if kernels else "; ".join(reasons.values()))
    if reason:
        offending = (str(k), str(n), dtype)
        assert any(number in reason for number in offending), reason
        return
    torch_dtype = getattr(torch, dtype)
    weight, bias = (torch.randn(n, k) * 0.05).to(torch_dtype), torch.randn(n).to(torch_dtype)
    canonical = candidate.quantize(weight)
    assert tuple(canonical) == candidate.tensors
    assert all(type(tensor) is Tensor and tensor.is_contiguous() for tensor in canonical.values())
    x = torch.randn(40, k).to(torch_dtype)
    meaning = candidate.linear(x.double(), canonical, bias.double())
    for kernel in kernels:
        y = kernel.run(x, kernel.layout.pack(canonical), bias, torch_dtype)
        assert y.dtype == torch_dtype
        # bfloat16 inside some kernels rounds activations and output: 2^-8 each
        assert relative_error(y, meaning) < 0.03, kernel.name
    if k >= 96 and n >= 8:
        exact = x.double() @ weight.double().T + bias.double()
        assert relative_error(meaning, exact) < SQNR_FLOOR.get(name, 0.12)


@pytest.mark.parametrize("name", names())
def test_quantizing_does_not_touch_the_weight(name: str) -> None:
    weight = torch.randn(32, 128)
    before = weight.clone()
    find_candidate(name).quantize(weight)
    assert torch.equal(weight, before)


def test_a_registered_name_cannot_be_taken_again() -> None:
    class Impostor(Candidate):
        name = "int8_dynamic"
        tensors = ("weight",)

        def quantize(self, weight: Tensor) -> packing.Canonical:
            return {"weight": weight}

    with pytest.raises(CandidateError, match=r"'int8_dynamic' is taken by .*Int8Dynamic"):
        base.register_candidate(Impostor())


def test_unknown_candidates_are_refused_with_those_there_are() -> None:
    with pytest.raises(CandidateError, match=r"no candidate is named 'int3'; there are none, bf16"):
        base.select(["int3"])
    with pytest.raises(CandidateError, match="sequence of names"):
        base.select("int8_dynamic")


def test_selection_always_holds_none_and_ignores_the_callers_order() -> None:
    first = base.select(["int8_dynamic", "bf16"])
    assert [candidate.name for candidate in first] == ["none", "bf16", "int8_dynamic"]
    assert first == base.select(["bf16", "int8_dynamic", "none"])
    assert [candidate.name for candidate in base.select(["int4_grouped"])] == [
        "none",
        "int4_g128",
        "int4_g32",
        "int4_g64",
    ]
