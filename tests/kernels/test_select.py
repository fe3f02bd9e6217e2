"""Which implementation computes an operation, and what a person may ask for."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armillary.kernels import select
from armillary.kernels.select import OPERATIONS, VARIABLE, overrides, use_triton

NAMED = [operation for operation in OPERATIONS if operation != "attention"]  # which has a table of its own
IMPORTS = """
import sys, torch
from armillary.kernels import norm, rope, swiglu
x = torch.ones(1, 3, 2, 4, requires_grad=True)
out, total = norm.add_rms_norm(x, x, torch.ones(4), 1e-5)
turned, _ = rope.rotate_qk(out, total, torch.ones(1, 3, 1, 2), torch.zeros(1, 3, 1, 2))
swiglu.swiglu(turned, total).sum().backward()
assert "triton" not in sys.modules
"""


class OnGPU:
    """As much of a tensor on a GPU as the choice looks at."""

    is_cuda = True

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.parametrize("operation", NAMED)
def test_triton_only_where_all_tensors_are_on_a_gpu(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "has_triton", lambda: True)
    here, there = torch.ones(2), OnGPU(torch.bfloat16)
    assert use_triton(operation, there, there)  # type: ignore[arg-type]
    assert not use_triton(operation, there, here)  # type: ignore[arg-type]
    assert not use_triton(operation, here)
    monkeypatch.setattr(select, "has_triton", lambda: False)
    assert not use_triton(operation, there)  # type: ignore[arg-type]


@pytest.mark.parametrize("operation", NAMED)
@pytest.mark.parametrize("asked", ["", "triton"])
def test_float64_is_plain_torchs(operation: str, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "has_triton", lambda: True)
    monkeypatch.setenv(VARIABLE, asked)
    assert not use_triton(operation, OnGPU(torch.float32), OnGPU(torch.float64))  # type: ignore[arg-type]
    assert use_triton(operation, OnGPU(torch.float32), OnGPU(torch.int64))  # type: ignore[arg-type]


def test_what_is_asked_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "has_triton", lambda: True)
    here, there = torch.ones(2), OnGPU(torch.float32)
    monkeypatch.setenv(VARIABLE, "triton")
    assert use_triton("norm", here)
    monkeypatch.setenv(VARIABLE, "torch")
    assert not use_triton("norm", there)  # type: ignore[arg-type]
    monkeypatch.setenv(VARIABLE, "norm=torch, rope=triton,")
    assert not use_triton("norm", there)  # type: ignore[arg-type]
    assert use_triton("rope", here)
    assert not use_triton("swiglu", here)
    assert use_triton("swiglu", there)  # type: ignore[arg-type]


@given(
    st.lists(st.tuples(st.sampled_from(OPERATIONS), st.sampled_from(["torch", "triton"]))), st.sampled_from(["", " "])
)
def test_the_last_word_on_an_operation_counts(pairs: list[tuple[str, str]], space: str) -> None:
    text = f"{space},{space}".join(f"{operation}={value}" for operation, value in pairs)
    assert overrides(text) == dict(pairs)
    assert overrides(f"torch,{text}") == dict.fromkeys(OPERATIONS, "torch") | dict(pairs)
    assert overrides(f"{text},triton") == dict.fromkeys(OPERATIONS, "triton")


@pytest.mark.parametrize(
    "part", ["cuda", "norm", "norm=", "norm=cuda", "nrom=triton", "=triton=", "norm==triton", "Triton"]
)
def test_what_does_not_exist_is_refused_by_name(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"rope=torch,{part}")
    with pytest.raises(ValueError) as raised:
        use_triton("rope", torch.ones(1))
    assert str(raised.value).startswith(
        f"ARMILLARY_KERNELS: {part!r}; allowed are torch, triton, or OPERATION=torch and OPERATION=triton with "
        f"OPERATION one of {', '.join(OPERATIONS)}"
    )


def test_on_the_cpu_triton_is_not_even_imported() -> None:
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
