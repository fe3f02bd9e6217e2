"""Attention's speed on the card, forward and backward, beside torch's flash op, cuDNN's and compiled FlexAttention."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from armillary.kernels.attention import call as front
from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places
from armillary.kernels.attention.tiles import Tile
from armillary.launch.bench_gpu.sections import Job
from armillary.launch.bench_gpu.targets import LENGTH, TARGETS
from armillary.launch.bench_gpu.timing import Setting, Times, measure
from armillary.launch.rows import Row

TOTAL, WIDTH = 16384, 2048
"""Tokens of a batch, and channels of all heads: the setting of the FlashAttention papers."""
SLACK = 1.01
"""What counts as as fast: times vary by as much."""


@dataclass(frozen=True)
class Case:
    """One call, the same for ours and all peers."""

    name: str
    batch: int
    lengths: tuple[int, ...]
    """Of the documents of each row."""
    mask: Mask
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def seq(self) -> int:
        return sum(self.lengths)

    @property
    def kind(self) -> str:
        """full, causal, window or packed."""
        if len(self.lengths) > 1:
            return "packed"
        return "window" if self.mask.window else "causal" if self.mask.causal else "full"

    def tile(self) -> Tile:
        places = Places.packed([self.lengths] * self.batch)
        return Tile(places, places, self.mask, self.head_dim**-0.5)

    def flop(self) -> float:
        """Of the forward pass, as the FlashAttention papers count."""
        pairs = 0.0
        for length in self.lengths:
            if self.mask.window:
                reach = min(self.mask.window, length)
                pairs += reach * length - reach * (reach - 1) / 2
            else:
                pairs += length * length / (2 if self.mask.causal else 1)
        return 4 * self.batch * self.heads * self.head_dim * pairs


def cases(dry: bool) -> Iterator[Case]:
    """Those with a target first, so that they are measured whatever happens."""
    if dry:
        yield Case("d16 causal 48", 1, (48,), Mask(), 2, 1, 16)
        yield Case("d16 packed", 1, (20, 1, 19), Mask(), 2, 2, 16)
        yield Case("d16 window 8", 1, (40,), Mask(window=8), 2, 2, 16)
        return
    yield from _plain(LENGTH)
    yield Case("d128 causal 8192, 32:8 heads", 2, (8192,), Mask(), 32, 8, 128)
    for head_dim in (128, 64):
        heads = WIDTH // head_dim
        lengths = document_lengths(TOTAL)
        told = f"d{head_dim} packed {len(lengths)} documents of {TOTAL} tokens"
        yield Case(told, 1, lengths, Mask(), heads, heads, head_dim)
    yield Case("d128 window 4096 of 16384", 1, (TOTAL,), Mask(window=4096), 16, 16, 128)
    for seq in (4096, 16384, 2048, 1024):
        yield from _plain(seq)


def _plain(seq: int) -> Iterator[Case]:
    for head_dim in (128, 64):
        heads = WIDTH // head_dim
        for name, mask in (("causal", Mask()), ("full", Mask(causal=False))):
            yield Case(f"d{head_dim} {name} {seq}", TOTAL // seq, (seq,), mask, heads, heads, head_dim)


def document_lengths(total: int) -> tuple[int, ...]:
    """Lognormal lengths, median 600 tokens, as of web pages; together `total`."""
    drawn = np.random.default_rng(0).lognormal(math.log(600), 1.0, total).astype(int).clip(16)
    count = int(np.searchsorted(np.cumsum(drawn), total))
    return (*drawn[:count].tolist(), int(total - drawn[:count].sum()))


def jobs(setting: Setting) -> list[Job]:
    return [(case.name, partial(run, case, setting)) for case in cases(setting.dry)]


def run(case: Case, setting: Setting) -> list[Row]:
    """Two rows, forward and backward; `peers` has those of the peers, or why there is none."""
    from armillary.launch.bench_gpu.peers import peers_of

    generator = torch.Generator(setting.device).manual_seed(0)
    q, k, v, d_out = (
        torch.randn(
            case.batch, case.seq, heads, case.head_dim,
            dtype=setting.narrow, device=setting.device, generator=generator,
        )
        for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    )  # fmt: skip
    tile = case.tile()
    peers = peers_of(case, q, k, v, d_out)

    def ours() -> front.Partial:
        return front.forward(q, k, v, tile, implementation="triton")

    forward = measure({"ours": ours, **{name: peer.forward for name, peer in peers.items()}}, setting)
    out, lse = ours()

    def ours_back() -> front.Gradients:
        delta = front.row_dots(out, d_out, lse)
        return front.backward(d_out, q, k, v, lse, delta, tile, implementation="triton")

    back = measure({"ours": ours_back, **{name: peer.backward for name, peer in peers.items()}}, setting)
    flop = case.flop()
    rows = [_row(case, "forward", forward, flop, setting), _row(case, "backward", back, 2.5 * flop, setting)]
    rows[0]["agreement"] = agreement(out, peers["flash"].forward()) if "flash" in forward.seconds else None
    return rows


def agreement(out: Tensor, theirs: Tensor) -> float:
    """Largest difference of ours and a peer's result: that both compute the same."""
    return (theirs.reshape(out.shape) - out).abs().max().item()


def _row(case: Case, direction: str, times: Times, flop: float, setting: Setting) -> Row:
    """`ratio` is to the fastest peer, or 0 without one."""
    name = f"{direction} {case.name}"
    peers: dict[str, Row] = {name: {"error": text} for name, text in times.errors.items() if name != "ours"}
    if "ours" not in times.seconds:
        return {"name": name, "ok": False, "error": times.errors["ours"], "peers": peers}
    own = times.seconds["ours"]
    for peer, seconds in times.seconds.items():
        if peer != "ours":
            peers[peer] = {"seconds": seconds, "ratio": seconds / own, "tflops": flop / seconds / 1e12}
    fastest = min((each["seconds"] for each in peers.values() if "seconds" in each), default=0.0)
    row: Row = {
        "name": name,
        "seconds": own,
        "ratio": fastest / own,
        "tflops": flop / own / 1e12,
        "flop": flop,
        "host_seconds": times.host["ours"],
        "repetitions": times.repetitions,
        "bytes": _bytes(case, direction, setting),
        "peers": peers,
        "note": ", ".join(f"{peer} {each['tflops']:.0f}" for peer, each in peers.items() if "tflops" in each),
    }
    if "seconds" in peers.get("flash", {}):
        row["not_below_flash"] = peers["flash"]["seconds"] * SLACK >= own
    plain = case.seq == LENGTH and case.kv_heads == case.heads
    target = TARGETS.get((direction, case.head_dim, case.kind)) if plain else None
    if target is not None and not setting.dry and "H100" in torch.cuda.get_device_name():
        row |= {"target": target, "reached": row["tflops"] >= target}
    return row


def _bytes(case: Case, direction: str, setting: Setting) -> int:
    """Between L2 and the processors, by the meter."""
    from armillary.kernels.attention.configs import KERNELS, block_config
    from armillary.kernels.attention.flash_triton import architecture_of
    from armillary.kernels.attention.traffic import Sizes, traffic

    architecture = architecture_of(setting.device)
    found = {kernel: block_config(kernel, case.head_dim, setting.narrow, architecture) for kernel in KERNELS}
    blocks = {kernel: (config.queries, config.keys) for kernel, config in found.items()} | {"delta": (1, 1)}
    wanted = ("forward",) if direction == "forward" else ("delta", "query_gradient", "key_gradient")
    tile, sizes = case.tile(), Sizes(case.heads, case.kv_heads, case.head_dim)
    return sum(traffic(kernel, tile, sizes, *blocks[kernel]).bytes for kernel in wanted)
