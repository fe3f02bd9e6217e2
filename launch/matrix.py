"""`armillary matrix`: every pair of features that a run can have at once, each case against one process."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from armillary.launch.matrix_ranks import judge_on_ranks
from armillary.train.proof.matrix import (
    ALLOWED,
    MOST_RANKS,
    Case,
    all_pairs,
    covering_set,
    num_ranks,
    pairs_of,
    sample,
    title,
)


def run_matrix(ranks: int, full: bool, count: int, seed: int) -> dict[str, Any]:
    """Runs the cases, prints and returns a table.

    Args:
        ranks: leave out cases that need more.
        full: of the full product, not the covering set.
        count: with `full`, only so many, drawn at random; 0 for all.
        seed: of the drawing.

    Returns:
        `cases` (rows with the levels, `ranks`, `error`, `worst`, `allowed`, `ok`, `seconds`), `pairs`, `pairs_covered`,
        `worst_float64`, `worst_bfloat16`, `refused` (rows with `pair` and `sentence`), `seconds`, `ok`.

    Raises:
        ValueError: for more ranks than the matrix has.
    """
    if not 1 <= ranks <= MOST_RANKS:
        raise ValueError(f"--ranks {ranks}: the matrix has cases of 1 to {MOST_RANKS} ranks")
    if (count or seed) and not full:
        raise ValueError("--sample and --seed: the covering set is one set; add --full to draw from the product")
    every: Sequence[Case] = sample(count, seed) if full else covering_set()
    cases = [case for case in every if num_ranks(case) <= ranks]
    started = time.perf_counter()
    rows = []
    with tempfile.TemporaryDirectory(prefix="armillary-matrix-") as folder:
        for number, case in enumerate(cases, 1):
            row = {**case, "ranks": num_ranks(case), **judge_on_ranks(case, num_ranks(case), Path(folder))}
            rows.append(row)
            print(f"{number:3}/{len(cases)} {_line(case, row)}", flush=True)
    return _summary(cases, rows, time.perf_counter() - started)


def _line(case: Case, row: dict[str, Any]) -> str:
    worst = row["worst"].strip().splitlines()[-1]
    verdict = "" if row["ok"] else "  DIFFERENT"
    return f"{row['ranks']} ranks {row['error']:8.1e} {row['seconds']:5.1f} s  {title(case)}  ({worst}){verdict}"


def _summary(cases: Sequence[Case], rows: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    possible, refused = all_pairs()
    covered = {pair for case in cases for pair in pairs_of(case)} & set(possible)
    worst = {
        precision: max((row["error"] for row in rows if row["precision"] == precision), default=0.0)
        for precision in ("float64", "bfloat16")
    }
    wrong = [row for row in rows if not row["ok"]]
    print(f"{len(cases)} cases, {len(covered)} of {len(possible)} pairs, in {seconds:.0f} s: {len(wrong)} different")
    print(f"worst relative error in float64: {worst['float64']:.1e}, allowed {ALLOWED['float64']:.0e}")
    print(
        f"worst error in bfloat16: {worst['bfloat16']:.2f} times that of one process, allowed {ALLOWED['bfloat16']:.0f}"
    )
    print(f"{len(refused)} pairs are refused, for {len(sentences := _grouped(refused))} reasons:")
    for sentence, pairs in sentences.items():
        print(f"  {len(pairs)} pairs: {sentence}")
    turned_down = [{"pair": [" ".join(level) for level in pair], "sentence": told} for pair, told in refused.items()]
    return {
        "cases": list(rows),
        "pairs": len(possible),
        "pairs_covered": len(covered),
        "worst_float64": worst["float64"],
        "worst_bfloat16": worst["bfloat16"],
        "refused": turned_down,
        "seconds": seconds,
        "ok": not wrong,
    }


def _grouped(refused: dict[Any, str]) -> dict[str, list[Any]]:
    """Pairs by their sentence, in which only the degree differs."""
    groups: dict[str, list[Any]] = {}
    for pair, sentence in refused.items():
        groups.setdefault(sentence, []).append(pair)
    return groups
