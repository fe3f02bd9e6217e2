"""Which implementation computes an operation: Triton's kernels on a GPU, plain torch elsewhere, or what a person asks.

`ARMILLARY_KERNELS` overrides: "torch" or "triton" for all operations, or a list such as "norm=torch,rope=triton". For
attention "torch" is whatever `attention/choice.py` has for the device; "cpu" and "reference" may be named too.
"""

import functools
import importlib.util
import os

import torch
from torch import Tensor

VALUES = ("torch", "triton")
OPERATIONS = ("attention", "cross_entropy", "merge", "norm", "quantise", "rope", "swiglu")
VARIABLE = "ARMILLARY_KERNELS"


def use_triton(operation: str, *tensors: Tensor) -> bool:
    """Whether Triton's kernel computes `operation` on these tensors.

    By default where all are on a GPU, none is float64 and triton is installed. Asked for by name it also runs on the
    CPU, in Triton's interpreter, which TRITON_INTERPRET=1 turns on.

    Raises:
        ValueError: if ARMILLARY_KERNELS names an operation or implementation that does not exist.
    """
    chosen = overrides(os.environ.get(VARIABLE, "")).get(operation)
    possible = all(tensor.dtype != torch.float64 for tensor in tensors)
    if chosen is None:
        return possible and all(tensor.is_cuda for tensor in tensors) and has_triton()
    return possible and chosen == "triton"


@functools.cache
def has_triton() -> bool:
    """Whether the package is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def overrides(text: str) -> dict[str, str]:
    """ARMILLARY_KERNELS as operation -> implementation."""
    chosen: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.rpartition("=")
        names = OPERATIONS if not name else (name,)
        known = value in VALUES or (name == "attention" and value in ("cpu", "reference"))
        if not known or not set(names) <= set(OPERATIONS):
            raise ValueError(
                f"{VARIABLE}: {part!r}; allowed are torch, triton, or OPERATION=torch and OPERATION=triton with "
                f"OPERATION one of {', '.join(OPERATIONS)}; also attention=cpu and attention=reference"
            )
        chosen |= dict.fromkeys(names, value)
    return chosen
