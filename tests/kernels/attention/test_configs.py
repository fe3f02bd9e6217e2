"""The shipped table of block sizes."""

import pytest
import torch

from armillary.kernels.attention.configs import BUCKETS, KERNELS, TABLES, block_config, longest, relative
from armillary.kernels.specimen import ARCHITECTURES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_head_has_a_configuration(architecture: str, dtype: torch.dtype) -> None:
    for kernel in KERNELS:
        for head_dim in range(1, longest(dtype) + 1):
            config = block_config(kernel, head_dim, dtype, architecture)
            for size in (config.queries, config.keys):
                assert size >= 16
                assert size & (size - 1) == 0, "blocks are powers of two, as tl.arange wants them"
            # 65,536 registers a processor: more warps could not have the 255 registers each that are asked for.
            assert config.num_warps <= 8
            assert not config.split or kernel == "key_gradient"


def test_each_table_is_whole() -> None:
    assert set(TABLES) == set(ARCHITECTURES)
    assert all(tuple(table) == BUCKETS for table in TABLES.values())


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("sm_90", "sm_90"), ("sm_103", "sm_100"), ("sm_89", "sm_120"), ("sm_121", "sm_120"), ("gfx90a", "gfx942")],
)
def test_a_gpu_without_a_table_has_a_relatives(architecture: str, expected: str) -> None:
    assert relative(architecture) == expected


def test_a_head_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim 257"):
        block_config("forward", 257, torch.bfloat16, "sm_90")
    with pytest.raises(ValueError, match="head_dim 129"):
        block_config("forward", 129, torch.float32, "sm_90")
