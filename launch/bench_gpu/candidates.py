"""Other block sizes than the shipped ones, each kernel alone: what the table is revised from."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any
from unittest import mock

import torch

from armillary.kernels.attention import call as front
from armillary.kernels.attention.mask import Mask
from armillary.launch.bench_gpu.attention import TOTAL, WIDTH, Case
from armillary.launch.bench_gpu.sections import Job
from armillary.launch.bench_gpu.timing import Setting, measure
from armillary.launch.rows import Row

SEQ = 8192
CANDIDATES = {
    ("forward", 64): ((128, 128, 8, 2), (128, 128, 8, 3), (128, 128, 4, 2), (128, 64, 8, 3), (128, 64, 4, 3),
                      (128, 64, 4, 4), (64, 64, 4, 3)),
    ("forward", 128): ((128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (128, 64, 4, 3), (64, 128, 4, 2),
                       (64, 64, 4, 3), (128, 32, 8, 4)),
    ("query_gradient", 64): ((128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 3),
                             (128, 32, 4, 4)),
    ("query_gradient", 128): ((128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 128, 8, 2), (64, 64, 4, 2),
                              (64, 64, 4, 3)),
    ("key_gradient", 64): ((64, 128, 8, 3), (64, 128, 8, 2), (64, 128, 4, 3), (128, 128, 8, 2), (32, 128, 4, 3),
                           (64, 64, 4, 3)),
    ("key_gradient", 128): ((64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 3), (32, 128, 8, 2), (64, 64, 4, 2),
                            (64, 64, 4, 3)),
}  # fmt: skip
"""By kernel and head_dim: queries and keys a tile, warps, stages."""


def jobs(setting: Setting) -> list[Job]:
    found: list[Job] = []
    for kernel, head_dim in CANDIDATES:
        for name, mask in (("causal", Mask()), ("full", Mask(causal=False))):
            if setting.dry and (head_dim, name) != (64, "causal"):
                continue
            heads, seq = (WIDTH // head_dim, SEQ) if not setting.dry else (1, 40)
            batch = TOTAL // SEQ if not setting.dry else 1
            case = Case(f"{kernel} d{head_dim} {name} {seq}", batch, (seq,), mask, heads, heads, head_dim)
            found.append((case.name, partial(run, kernel, case, setting)))
    return found


def run(kernel: str, case: Case, setting: Setting) -> list[Row]:
    """A row for each configuration; `ratio` is the shipped one's time by its own."""
    from armillary.kernels.attention.configs import block_config
    from armillary.kernels.attention.flash_triton import architecture_of

    shipped = block_config(kernel, case.head_dim, setting.narrow, architecture_of(setting.device))
    others = [
        replace(shipped, queries=queries, keys=keys, num_warps=warps, num_stages=stages)
        for queries, keys, warps, stages in CANDIDATES[kernel, case.head_dim]
    ]
    if kernel == "key_gradient":
        others.append(replace(shipped, split=not shipped.split))
    configs = [shipped, *(config for config in others if config != shipped)][: 2 if setting.dry else None]
    names = [name_of(asdict(config)) for config in configs]
    launches = _launches(kernel, case, setting)
    turns = {name: _with(launches, config) for name, config in zip(names, configs, strict=True)}
    with _alone(kernel):
        times = measure(turns, setting)
    usual = times.seconds.get(names[0], 0.0)
    rows: list[Row] = []
    for name, config in zip(names, configs, strict=True):
        row: Row = {"name": f"{case.name}: {name}", "kernel": kernel, "config": asdict(config)}
        row["shipped"] = config == shipped
        if name in times.errors:
            # That one cannot be compiled is worth knowing, and no failure unless it is shipped.
            rows.append(row | {"error": times.errors[name], "ok": config != shipped})
            continue
        seconds = times.seconds[name]
        flop = case.flop() * {"forward": 1, "query_gradient": 1.5, "key_gradient": 2}[kernel]
        row |= {"seconds": seconds, "ratio": usual / seconds, "tflops": flop / seconds / 1e12}
        rows.append(row | {"note": "shipped" if config == shipped else "", "repetitions": times.repetitions})
    return rows


def name_of(config: dict[str, Any]) -> str:
    """Such as "128x64, num_warps 8, num_stages 3"; what is False is left out."""
    rest = [f"{key} {value}" for key, value in config.items() if key not in ("queries", "keys") and value is not False]
    return ", ".join([f"{config['queries']}x{config['keys']}", *rest])


def _launches(kernel: str, case: Case, setting: Setting) -> Callable[[Any], Any]:
    """Of a configuration: one launch of the kernel."""
    from armillary.kernels.attention import flash_triton

    q, k, v, d_out = (
        torch.randn(case.batch, case.seq, case.heads, case.head_dim, dtype=setting.narrow, device=setting.device)
        for _ in range(4)
    )
    tile = case.tile()
    out, lse = front.forward(q, k, v, tile, implementation="triton")
    if kernel == "forward":
        return lambda config: flash_triton.forward(q, k, v, tile, out, lse, False, config)
    delta = front.row_dots(out, d_out, lse)
    buffers = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))

    def backward(config: Any) -> None:
        nothing = (False, False, False)
        flash_triton.backward(d_out, q, k, v, lse, delta, tile, buffers, nothing, configs=(config, config))

    return backward


def _with(launch: Callable[[Any], Any], config: Any) -> Callable[[], Any]:
    return lambda: launch(config)


class _Nothing:
    """Stands where a kernel would be launched."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: None


@contextmanager
def _alone(kernel: str) -> Iterator[None]:
    """Of the two kernels of the backward pass, the other one is not launched."""
    from armillary.kernels.attention import flash_triton

    others = {"query_gradient": "key_gradient_kernel", "key_gradient": "query_gradient_kernel"}
    with ExitStack() as stack:
        if kernel in others:
            stack.enter_context(mock.patch.object(flash_triton, others[kernel], _Nothing()))
        yield
