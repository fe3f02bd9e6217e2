"""The attention kernels as they are shipped, to be compiled as proof."""

from collections.abc import Iterator

import torch
import triton

from armillary.kernels.attention.configs import BUCKETS, KERNELS, MOST_REGISTERS, BlockConfig, block_config, longest
from armillary.kernels.attention.flash_forward import forward_kernel
from armillary.kernels.attention.flash_key_gradient import key_gradient_kernel
from armillary.kernels.attention.flash_query_gradient import query_gradient_kernel
from armillary.kernels.attention.flash_ranges import Rule
from armillary.kernels.specimen import ARCHITECTURES, Specimen

FUNCTIONS = dict(zip(KERNELS, (forward_kernel, query_gradient_kernel, key_gradient_kernel), strict=True))
RULES = {
    "full": Rule(causal=False, window=False, far=False, strided=False, block=1),
    "causal": Rule(causal=True, window=False, far=False, strided=False, block=1),
    "window": Rule(causal=True, window=True, far=False, strided=False, block=1),
    "strided": Rule(causal=True, window=True, far=True, strided=True, block=64),
}
"""The kinds of mask, from the simplest kernel to the fullest."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def specimens() -> list[Specimen]:
    """Every configuration with every kind of mask; with the fullest, ragged heads and float32 too."""
    found: list[Specimen] = []
    for kernel in KERNELS:
        for head_dim in BUCKETS:
            for rule in RULES:
                found += _shipped(kernel, head_dim, rule, "bf16", into=False)
            found += _shipped(kernel, head_dim, "strided", "bf16", into=True)
            found += _shipped(kernel, head_dim - head_dim // 4, "strided", "bf16", into=False)
            if head_dim <= longest(torch.float32):
                found += _shipped(kernel, head_dim, "strided", "fp32", into=True)
        found += _shipped(kernel, 64, "causal", "fp16", into=False)
    return found


def _shipped(kernel: str, head_dim: int, rule: str, dtype: str, into: bool) -> Iterator[Specimen]:
    """One specimen for all architectures that share a configuration."""
    users: dict[BlockConfig, list[str]] = {}
    for architecture in ARCHITECTURES:
        users.setdefault(block_config(kernel, head_dim, DTYPES[dtype], architecture), []).append(architecture)
    for config, architectures in users.items():
        yield from _launches(kernel, head_dim, rule, dtype, config, into, tuple(architectures))


def _launches(
    kernel: str,
    head_dim: int,
    rule: str,
    dtype: str,
    config: BlockConfig,
    into: bool,
    architectures: tuple[str, ...],
) -> list[Specimen]:
    """The kernel's launches with one configuration; `into` folds into or adds to float32 buffers."""
    function = FUNCTIONS[kernel]
    constants = {"rule": RULES[rule], "D": max(16, triton.next_power_of_2(head_dim)), "HEAD_DIM": head_dim}
    constants |= {"BM": config.queries, "BN": config.keys}
    variants = {"": {"FOLD": into} if kernel == "forward" else {"ADD": into}}
    if kernel == "key_gradient":
        keys = {"KEYS": True, "ADD_K": into} | {"VALUES": not config.split, "ADD_V": into and not config.split}
        variants = {"": keys}
        if config.split:
            variants = {"_k": keys, "_v": {"KEYS": False, "ADD_K": False, "VALUES": True, "ADD_V": into}}
    shape = f"{config.queries}x{config.keys}_w{config.num_warps}_s{config.num_stages}"
    return [
        Specimen(
            f"attention_{kernel}{part}_d{head_dim}_{rule}_{dtype}{'_into' * into}_{shape}",
            function,
            _signature(function.arg_names, constants | variant, dtype, into),
            constants | variant,
            config.num_warps,
            config.num_stages,
            MOST_REGISTERS,
            unaligned=ODD,
            architectures=architectures,
            tensor_cores=dtype != "fp32",
        )
        for part, variant in variants.items()
    ]


ODD = frozenset({"group", "reach", "sinks", "stride", "shift", "first_head"}) | {
    "lse_batch",
    "lse_head",
    "offset_batch",
    "offset_head",
}
"""Arguments that need not be multiples of 16."""


def _signature(names: list[str], constants: dict[str, object], dtype: str, into: bool) -> dict[str, str]:
    narrow, results = f"*{dtype}", "*fp32" if into else f"*{dtype}"
    fixed = {"lse_ptr": "*fp32", "score_offset_ptr": "*fp32", "slope_offset_ptr": "*fp32", "scale": "fp32"}
    fixed |= {"blocks_ptr": "*i32", "runs_ptr": "*i32"}
    fixed |= dict.fromkeys(("out_ptr", "dq_ptr", "dk_ptr", "dv_ptr"), results)
    return {
        name: fixed.get(name, narrow if name.endswith("_ptr") else "i32") for name in names if name not in constants
    }
