"""The other kernels on the card: against float64, or, where bits are promised, against the CPU's bits."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from armillary.kernels.attention.merge import merge
from armillary.kernels.cross_entropy import IGNORE, linear_cross_entropy
from armillary.kernels.norm import add_rms_norm, rms_norm
from armillary.kernels.rope import frequencies, rotate_qk, tables
from armillary.kernels.swiglu import swiglu
from armillary.launch.bench_gpu.compare import judge, nan_filled, results
from armillary.launch.bench_gpu.plain import (
    EPS,
    plain_loss,
    plain_merge,
    plain_norm,
    plain_norm_of_sum,
    plain_rope,
    plain_swiglu,
)
from armillary.launch.bench_gpu.quantise import same_bits
from armillary.launch.bench_gpu.sections import Job
from armillary.launch.bench_gpu.shards import in_shards
from armillary.launch.bench_gpu.timing import Setting
from armillary.launch.rows import Row


def jobs(setting: Setting) -> list[Job]:
    dtypes = (torch.float16, torch.float32) if setting.dry else (torch.bfloat16, torch.float16, torch.float32)
    dims = (48,) if setting.dry else (80, 128, 1024, 4096, 8192, 16384)
    found: list[Job] = [
        ("quantise", partial(same_bits, setting)),
        ("cross entropy in shards", partial(sharded, setting, dtypes[0])),
    ]
    for dtype in dtypes:
        kind = str(dtype).removeprefix("torch.")
        found += [
            (f"norm {kind}", partial(norms, setting, dtype, dims)),
            (f"rope {kind}", partial(rope, setting, dtype)),
            (f"swiglu {kind}", partial(gate, setting, dtype)),
            (f"merge {kind}", partial(merged, setting, dtype)),
            (f"cross entropy {kind}", partial(cross_entropy, setting, dtype)),
        ]
    return found


def check(
    name: str, names: Sequence[str], ours: Callable[..., Any], plain: Callable[..., Any], inputs: Sequence[Tensor],
    pulls: Sequence[Tensor],
) -> Row:  # fmt: skip
    """`ours` beside `plain` torch in the same dtype and in float64: results, and gradients of all inputs."""
    with nan_filled():
        got, again = (results(ours, inputs, pulls) for _ in range(2))
    peers = results(plain, inputs, pulls)
    truths = results(plain, [t.double() for t in inputs], [t.double() for t in pulls])
    kind = str(inputs[0].dtype).removeprefix("torch.")
    return judge(f"{name} {kind}", names, got, peers, truths, again)


def numbers(setting: Setting, dtype: torch.dtype, *shapes: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes) + sum(map(sum, shapes)))
    return [torch.randn(tuple(shape), generator=generator).to(setting.device, dtype) for shape in shapes]


def norms(setting: Setting, dtype: torch.dtype, dims: Sequence[int]) -> list[Row]:
    rows = []
    for dim in dims:
        shape = (3, 203, dim) if not setting.dry else (3, 5, dim)
        x, residual, weight, *pulls = numbers(setting, dtype, shape, shape, (dim,), shape, shape)
        ours: Any = partial(rms_norm, eps=EPS)
        rows.append(check(f"norm {dim}", ("out", "dx", "dw"), ours, plain_norm, [x, weight], pulls[:1]))
        names, ours = ("out", "sum", "dx", "dr", "dw"), partial(add_rms_norm, eps=EPS)
        rows.append(check(f"norm of a sum {dim}", names, ours, plain_norm_of_sum, [x, residual, weight], pulls))
    return rows


def rope(setting: Setting, dtype: torch.dtype) -> list[Row]:
    rows = []
    for head_dim in (16,) if setting.dry else (64, 80, 128, 256):
        seq = 7 if setting.dry else 300
        q, k, d_q, d_k = numbers(setting, dtype, *[(2, seq, heads, head_dim) for heads in (6, 2, 6, 2)])
        positions = (torch.arange(2 * seq).view(2, seq) * 331) % 100_000
        exact = [table.to(setting.device) for table in tables(positions, frequencies(head_dim, 1e4), torch.float64)]

        def plain(q: Tensor, k: Tensor, exact: list[Tensor] = exact) -> tuple[Tensor, Tensor]:
            cos, sin = (table.to(torch.float64 if q.dtype == torch.float64 else torch.float32) for table in exact)
            return plain_rope(q, k, cos, sin)

        cos, sin = (table.float() for table in exact)
        ours = lambda q, k, cos=cos, sin=sin: rotate_qk(q, k, cos, sin)  # noqa: E731
        rows.append(check(f"rope {head_dim}", ("q", "k", "dq", "dk"), ours, plain, [q, k], [d_q, d_k]))
    return rows


def gate(setting: Setting, dtype: torch.dtype) -> list[Row]:
    shape = (5, 77) if setting.dry else (61, 1733)
    one, two, pull = numbers(setting, dtype, shape, shape, shape)
    return [check("swiglu", ("out", "dg", "du"), swiglu, plain_swiglu, [one, two], [pull])]


def merged(setting: Setting, dtype: torch.dtype) -> list[Row]:
    """Partial results of `dtype` and float32; also where one side saw nothing."""
    shape = (2, 9, 3, 16) if setting.dry else (2, 301, 6, 128)
    of_rows = (shape[0], shape[2], shape[1])
    out_a, out_b, d_out = numbers(setting, dtype, shape, shape, shape)
    lse_a, lse_b, d_lse = numbers(setting, torch.float32, of_rows, of_rows, of_rows)
    lse_b[..., ::5] = -torch.inf

    names = ("out", "lse", "da", "dla", "db", "dlb")
    ours = lambda a, la, b, lb: merge((a, la), (b, lb))  # noqa: E731
    return [check("merge", names, ours, plain_merge, [out_a, lse_a, out_b, lse_b], [d_out, d_lse])]


def tokens_of(setting: Setting, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, int]:
    tokens, dim, vocab = (12, 16, 70) if setting.dry else (512, 256, 50257)
    hidden, weight = numbers(setting, dtype, (tokens, dim), (vocab, dim))
    labels = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(1))
    labels[::7] = IGNORE
    return [hidden, weight * dim**-0.5], labels.to(setting.device), -(-tokens // 3)


def cross_entropy(setting: Setting, dtype: torch.dtype) -> list[Row]:
    inputs, labels, chunk = tokens_of(setting, dtype)
    ours = lambda h, w: linear_cross_entropy(h, w, labels, chunk)  # noqa: E731
    pull = torch.ones((), device=setting.device)
    return [check("cross entropy", ("loss", "dh", "dw"), ours, partial(plain_loss, labels=labels), inputs, [pull])]


def sharded(setting: Setting, dtype: torch.dtype) -> list[Row]:
    """The vocabulary over three ranks."""
    inputs, labels, chunk = tokens_of(setting, dtype)
    pull = torch.ones((), device=setting.device)
    with nan_filled():
        got, again = (in_shards(inputs[0], inputs[1], labels, chunk, pull) for _ in range(2))
    plain = partial(plain_loss, labels=labels)
    peers = results(plain, inputs, [pull])
    truths = results(plain, [t.double() for t in inputs], [pull.double()])
    kind = str(dtype).removeprefix("torch.")
    return [judge(f"cross entropy in 3 shards {kind}", ("loss", "dh", "dw"), got, peers, truths, again)]
