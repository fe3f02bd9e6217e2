"""Launches the Triton attention kernels: any tile, on a GPU, or in Triton's interpreter on the CPU."""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from armillary.kernels.attention.configs import MOST_REGISTERS, BlockConfig, block_config
from armillary.kernels.attention.flash_forward import forward_kernel
from armillary.kernels.attention.flash_key_gradient import key_gradient_kernel
from armillary.kernels.attention.flash_query_gradient import query_gradient_kernel
from armillary.kernels.attention.flash_ranges import Rule
from armillary.kernels.attention.tiles import Tile, key_tables, query_tables

LOG2E = 1 / math.log(2)
PARTS = {False: ((True, True),), True: ((True, False), (False, True))}
"""Whether each launch of the keys' kernel computes the gradient of keys, of values; by `BlockConfig.split`."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, tile: Tile, out: Tensor, lse: Tensor, fold: bool, config: BlockConfig | None = None
) -> None:
    """Fills `out` and `lse`, or folds the tile into what they hold (float32). See `call.forward`."""
    config = config or _config("forward", q)
    tables = query_tables(tile, config.queries, q.device)
    q, k, v = map(_rows_of_dims, (q, k, v))
    grid = (len(tables.blocks), q.shape[2])
    forward_kernel[grid](
        q, k, v, out, lse, tables.blocks, tables.runs,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *lse.stride()[:2],
        tile.scale * LOG2E, *_arguments(q, k, tile), rule=rule_of(tile), FOLD=fold,
        **_constants(q, config), **_options(config),
    )  # fmt: skip


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    tile: Tile,
    gradients: tuple[Tensor, Tensor, Tensor],
    add: tuple[bool, ...],
    configs: tuple[BlockConfig, BlockConfig] | None = None,
) -> None:
    """Fills the buffers `gradients`, or adds to those whose flag is set. See `call.backward`."""
    for_queries, for_keys = configs or (_config("query_gradient", q), _config("key_gradient", q))
    d_out, q, k, v = map(_rows_of_dims, (d_out.to(q.dtype), q, k, v))
    dq, dk, dv = gradients
    # Where a query saw nothing, its log-sum-exp is -inf, and its probabilities are to be 0.
    score_offset = torch.where(lse == -math.inf, lse, lse * (-1 / tile.scale)).contiguous()
    slope_offset = delta.neg().contiguous()
    inputs = (d_out, q, k, v, score_offset, slope_offset)
    strides = [stride for tensor in (d_out, q, k, v) for stride in tensor.stride()[:3]] + list(
        score_offset.stride()[:2]
    )
    tables = query_tables(tile, for_queries.queries, q.device)
    query_gradient_kernel[(len(tables.blocks), q.shape[2])](
        *inputs, dq, tables.blocks, tables.runs, *strides, *dq.stride()[:3],
        tile.scale, *_arguments(q, k, tile), rule=rule_of(tile), ADD=add[0],
        **_constants(q, for_queries), **_options(for_queries),
    )  # fmt: skip
    tables = key_tables(tile, for_keys.keys, q.device)
    for keys, values in PARTS[for_keys.split]:
        key_gradient_kernel[(len(tables.blocks), k.shape[2])](
            *inputs, dk, dv, tables.blocks, tables.runs, *strides, *dk.stride()[:3], *dv.stride()[:3],
            tile.scale, *_arguments(q, k, tile), rule=rule_of(tile), KEYS=keys, VALUES=values,
            ADD_K=add[1] and keys, ADD_V=add[2] and values, **_constants(q, for_keys), **_options(for_keys),
        )  # fmt: skip


def rule_of(tile: Tile) -> Rule:
    """What of the tile's mask is compiled in."""
    mask = tile.mask
    return Rule(mask.causal, mask.window > 0, mask.sinks > 0 or mask.stride > 0, mask.stride > 0, mask.block)


def _arguments(q: Tensor, k: Tensor, tile: Tile) -> tuple[int, ...]:
    mask = tile.mask
    return (q.shape[2] // k.shape[2], mask.reach, mask.sinks, mask.stride, mask.shift, tile.first_head)


def _constants(q: Tensor, config: BlockConfig) -> dict[str, Any]:
    head_dim = q.shape[3]
    padded = max(16, triton.next_power_of_2(head_dim))
    return {"BM": config.queries, "BN": config.keys, "D": padded, "HEAD_DIM": head_dim}


def _options(config: BlockConfig) -> dict[str, Any]:
    # Triton 3.10 turns fusion of multiply and add off unless it is asked for.
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    return options if torch.version.hip else options | {"maxnreg": MOST_REGISTERS}


def _config(kernel: str, q: Tensor) -> BlockConfig:
    return block_config(kernel, q.shape[3], q.dtype, architecture_of(q.device))


def architecture_of(device: torch.device) -> str:
    """Name of a GPU's instruction set, such as sm_90 or gfx942; the interpreter on the CPU stands in for an sm_90."""
    if device.type == "cpu":
        return "sm_90"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _rows_of_dims(tensor: Tensor) -> Tensor:
    """The tensor with neighbouring channels next to each other in memory."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
