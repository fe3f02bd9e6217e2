"""The other kernels' speed: beside plain torch, what torch.compile makes of it, and the card's copies."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.kernels.attention.merge import merge
from armillary.kernels.cross_entropy import linear_cross_entropy
from armillary.kernels.norm import add_rms_norm, rms_norm
from armillary.kernels.rope import frequencies, rotate_qk, tables
from armillary.kernels.swiglu import swiglu
from armillary.launch.bench_gpu.plain import (
    EPS,
    chunked_loss,
    plain_loss,
    plain_merge,
    plain_norm,
    plain_norm_of_sum,
    plain_rope,
    plain_swiglu,
)
from armillary.launch.bench_gpu.quantise import quantise_rows
from armillary.launch.bench_gpu.sections import Job
from armillary.launch.bench_gpu.timing import Setting, Times, copy_bandwidth, measure
from armillary.launch.rows import Row


def jobs(setting: Setting) -> list[Job]:
    """A row for each operation and direction."""
    copy = copy_bandwidth(setting) if not setting.prepare else 1.0
    works = (norm, norm_of_sum, rope, gate, joined, cross_entropy)
    found: list[Job] = [(work.__name__, functools.partial(work, setting, copy)) for work in works]
    return [*found, ("quantise", functools.partial(quantise_rows, setting, copy))]


def norm(setting: Setting, copy: float) -> list[Row]:
    tokens, dim = sizes(setting, (16384, 4096), (8, 32))
    x, weight, pull = numbers(setting, (tokens, dim), (dim,), (tokens, dim))
    ours: Any = lambda x, w: rms_norm(x, w, EPS)  # noqa: E731
    moved = (2 * tokens * dim * x.itemsize, 3 * tokens * dim * x.itemsize)
    return both_ways("norm", ours, plain_norm, [x, weight], [pull], moved, setting, copy)


def norm_of_sum(setting: Setting, copy: float) -> list[Row]:
    tokens, dim = sizes(setting, (16384, 4096), (8, 32))
    x, residual, *pulls = numbers(setting, *[(tokens, dim)] * 4)
    weight = numbers(setting, (dim,))[0]
    ours: Any = lambda x, r, w: add_rms_norm(x, r, w, EPS)  # noqa: E731
    moved = (4 * tokens * dim * x.itemsize, 4 * tokens * dim * x.itemsize)
    return both_ways("norm of a sum", ours, plain_norm_of_sum, [x, residual, weight], pulls, moved, setting, copy)


def rope(setting: Setting, copy: float) -> list[Row]:
    batch, seq, heads, kv_heads, head_dim = sizes(setting, (2, 8192, 32, 8, 128), (1, 8, 2, 1, 16))
    shapes = [(batch, seq, count, head_dim) for count in (heads, kv_heads)]
    q, k, *pulls = numbers(setting, *shapes, *shapes)
    turns = tables(torch.arange(seq)[None], frequencies(head_dim, 1e4), torch.float32)
    cos, sin = (table.to(setting.device) for table in turns)
    moved = 2 * (q.numel() + k.numel()) * q.itemsize
    ours: Any = lambda q, k: rotate_qk(q, k, cos, sin)  # noqa: E731
    plain: Any = lambda q, k: plain_rope(q, k, cos, sin)  # noqa: E731
    return both_ways("rope", ours, plain, [q, k], pulls, (moved, moved), setting, copy)


def gate(setting: Setting, copy: float) -> list[Row]:
    shape = sizes(setting, (16384, 14336), (8, 48))
    one, two, pull = numbers(setting, shape, shape, shape)
    moved = (3 * one.numel() * one.itemsize, 5 * one.numel() * one.itemsize)
    return both_ways("swiglu", swiglu, plain_swiglu, [one, two], [pull], moved, setting, copy)


def joined(setting: Setting, copy: float) -> list[Row]:
    batch, seq, heads, head_dim = sizes(setting, (1, 16384, 32, 128), (1, 8, 2, 16))
    out_a, out_b, pull = numbers(setting, *[(batch, seq, heads, head_dim)] * 3, dtype=torch.float32)
    lse_a, lse_b, of_lse = numbers(setting, *[(batch, heads, seq)] * 3, dtype=torch.float32)
    moved = (3 * out_a.numel() * 4 + 3 * lse_a.numel() * 4, 5 * out_a.numel() * 4 + 5 * lse_a.numel() * 4)
    ours: Any = lambda a, la, b, lb: merge((a, la), (b, lb))  # noqa: E731
    inputs, pulls = [out_a, lse_a, out_b, lse_b], [pull, of_lse]
    return both_ways("merge", ours, plain_merge, inputs, pulls, moved, setting, copy)


def cross_entropy(setting: Setting, copy: float) -> list[Row]:
    """Loss and both gradients together: ours computes them in the forward pass."""
    tokens, dim, vocab = sizes(setting, (8192, 4096, 128256), (8, 16, 70))
    hidden, weight = numbers(setting, (tokens, dim), (vocab, dim))
    weight *= dim**-0.5
    labels = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(0)).to(setting.device)
    peers: dict[str, Any] = {"plain": lambda h, w: plain_loss(h, w, labels)}
    peers["compiled"] = compiled(peers["plain"], setting)
    peers["chunked"] = lambda h, w: chunked_loss(h, w, labels, max(1, tokens // 8))
    if hasattr(F, "linear_cross_entropy"):
        peers["torch's own"] = lambda h, w: F.linear_cross_entropy(h, w, labels, reduction="sum")
    peers["ours"] = lambda h, w: linear_cross_entropy(h, w, labels)
    pull = torch.ones((), device=setting.device)
    turns = {name: there_and_back(call, [hidden, weight], [pull]) for name, call in peers.items()}
    moved = 2 * (tokens * dim + vocab * dim) * hidden.itemsize
    row = row_of("linear cross entropy, loss and gradients", measure(turns, setting), moved, copy)
    return [row | ({"tflops": 6 * tokens * dim * vocab / row["seconds"] / 1e12} if row.get("seconds") else {})]


def sizes(setting: Setting, real: tuple[int, ...], tiny: tuple[int, ...]) -> tuple[int, ...]:
    return tiny if setting.dry else real


def numbers(setting: Setting, *shapes: Sequence[int], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [torch.randn(tuple(shape), dtype=dtype or setting.narrow, device=setting.device) for shape in shapes]


def both_ways(
    name: str, ours: Callable[..., Any], plain: Callable[..., Any], inputs: list[Tensor], pulls: list[Tensor],
    moved: tuple[int, int], setting: Setting, copy: float,
) -> list[Row]:  # fmt: skip
    """A row forward and one backward; `moved` bytes each must take."""
    calls = {"ours": ours, "plain": plain, "compiled": compiled(plain, setting)}
    there = measure({key: without_graph(call, inputs) for key, call in calls.items()}, setting)
    back = measure({key: backward_of(call, inputs, pulls) for key, call in calls.items()}, setting)
    return [
        row_of(f"{name}, {direction}", times, size, copy)
        for direction, times, size in (("forward", there, moved[0]), ("backward", back, moved[1]))
    ]


def row_of(name: str, times: Times, moved: int, copy: float) -> Row:
    """`ratio` is to the fastest peer; `of_copy` the share of the card's copies."""
    peers: dict[str, Row] = {key: {"error": text} for key, text in times.errors.items() if key != "ours"}
    if "ours" not in times.seconds:
        return {"name": name, "ok": False, "error": times.errors["ours"], "peers": peers}
    own = times.seconds["ours"]
    peers |= {key: {"seconds": t, "ratio": t / own} for key, t in times.seconds.items() if key != "ours"}
    rate = moved / own
    row: Row = {"name": name, "seconds": own, "bytes": moved, "gb_per_s": rate / 1e9, "of_copy": rate / copy}
    row["ratio"] = min((each["ratio"] for each in peers.values() if "ratio" in each), default=0.0)
    row |= {"peers": peers, "host_seconds": times.host["ours"], "repetitions": times.repetitions}
    told = [f"{rate / copy:.2f} of a copy"] + [f"{key} {each.get('ratio', 0):.2f}x" for key, each in peers.items()]
    return row | {"note": ", ".join(told)}


def compiled(call: Callable[..., Any], setting: Setting) -> Callable[..., Any]:
    return torch.compile(call, **({"backend": "eager"} if setting.dry else {"dynamic": False}))


def without_graph(call: Callable[..., Any], inputs: Sequence[Tensor]) -> Callable[[], Any]:
    def turn() -> Any:
        with torch.no_grad():
            return call(*inputs)

    return turn


def there_and_back(call: Callable[..., Any], inputs: Sequence[Tensor], pulls: Sequence[Tensor]) -> Callable[[], Any]:
    def turn() -> Any:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(call(*leaves), leaves, list(pulls))

    return turn


def backward_of(call: Callable[..., Any], inputs: Sequence[Tensor], pulls: Sequence[Tensor]) -> Callable[[], Any]:
    """The gradients alone; the graph is made by the first call, outside what is timed."""
    kept: list[Mapping[str, Any]] = []

    def turn() -> Any:
        if not kept:
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            outputs = call(*leaves)
            kept.append({"outputs": outputs if isinstance(outputs, tuple) else (outputs,), "leaves": leaves})
        graph = kept[0]
        return torch.autograd.grad(graph["outputs"], graph["leaves"], list(pulls), retain_graph=True)

    return turn
