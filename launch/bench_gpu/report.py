"""What `armillary bench gpu` says about its figures, and its table at the end."""

from collections.abc import Sequence

from armillary.launch.bench_gpu.targets import TARGETS
from armillary.launch.rows import Row, print_table

FLOP_COUNT = (
    "as in the FlashAttention papers: 4 * queries * keys * head_dim * heads forward, half of that for causal, of "
    "packed documents the sum over documents, of a window the visible pairs; 2.5 times as much backward"
)
ERROR_RULE = (
    "against float64: the largest error at most twice that of the same formula in plain torch in the same dtype plus "
    "one unit of rounding (eps) of the largest value, and the same of the mean error; log-sum-exp at most 1e-5 of "
    "(1 + the largest); everything that a kernel leaves unwritten is NaN, and two calls give the same bits"
)
NOTES = {
    "flop": FLOP_COUNT,
    "errors": ERROR_RULE,
    "ratio": "seconds of the peer by ours (more than 1: we are faster); of candidates, of the shipped one by theirs",
    "bytes": "of attention, between L2 and the processors as kernels/attention/traffic.py counts them; of layers, what "
    "must come from or go to memory once",
    "time": "median of CUDA events around one call; the calls compared take turns, each round starts with another "
    "one, after warm-up; before each call 256 MiB are written, so that L2 holds nothing of its inputs, and the GPU "
    "waits as long as the host takes to launch it, so that the time is the GPU's alone; host_seconds is the host's",
    "backward": "ours includes delta and the offsets, as the peers' do; gradients of q, k and v",
    "targets": {f"{direction} d{head_dim} {mask}": target for (direction, head_dim, mask), target in TARGETS.items()},
    "target": "TFLOP/s of H100, bfloat16, 8192 tokens; reached says whether, and not_below_flash whether ours is as "
    "fast as torch's flash op within 1%",
}


def print_summary(rows: Sequence[Row], sections: Sequence[Row]) -> None:
    """Attention beside its peers, then what failed, then the sections."""
    kept = [row for row in rows if row["section"] == "attention" and "peers" in row]
    if kept:
        peers = sorted({peer for row in kept for peer in row["peers"]})
        lines = [["attention, TFLOP/s", "ours", *peers, "target", ""]]
        lines += [[row["name"], _number(row.get("tflops")), *_beside(row, peers), *_target(row)] for row in kept]
        print()
        print_table(lines)
    failures = [row for row in rows if not row["ok"]]
    for row in failures:
        print(f"FAILED {row['section']}: {row['name']}: {row.get('error') or row['note']}")
    print()
    header = ["section", "seconds", "rows", "failed"]
    counts = [(s, [row for row in rows if row["section"] == s["name"]]) for s in sections]
    table = [
        [s["name"], f"{s['seconds']:.0f}", str(len(own)), str(sum(not row["ok"] for row in own))] for s, own in counts
    ]
    print_table([header, *table])


def _beside(row: Row, peers: Sequence[str]) -> list[str]:
    return [_number(row["peers"].get(peer, {}).get("tflops")) for peer in peers]


def _target(row: Row) -> list[str]:
    told = "" if row.get("not_below_flash", True) else "below flash"
    if "target" not in row:
        return ["", told]
    return [str(row["target"]), ", ".join(filter(None, ["reached" if row["reached"] else "missed", told]))]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
