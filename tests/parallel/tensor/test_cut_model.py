"""Tensor ranks compute what one process computes, to the last digits of float64, and move the bytes they should."""

import hashlib
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from tensor_cases import Case, alone, error, make, on_rank

from armillary.comm.ledger import Ledger
from armillary.parallel.held import part_of
from armillary.parallel.tensor.bytes import replica_bytes, tensor_bytes
from armillary.parallel.tensor.cuts import tensor_cuts

BIG = Case(heads=(6, 2), hidden=29, vocab=53, grid=(2, 11), tied=False, qk_norm=True, qkv_bias=True)
CASES = {
    2: [
        Case(),
        replace(BIG, heads=(6, 3), recompute="selective", packed=True),
        Case(heads=(4, 1), labels="none", recompute="full"),
        Case(heads=(2, 2), qkv_bias=True, labels="all", hidden=3, vocab=3),
    ],
    3: [
        BIG,
        Case(heads=(6, 1), qk_norm=True, recompute="full", packed=True),
        Case(heads=(4, 4), hidden=3, vocab=2, grid=(1, 1)),
        Case(heads=(3, 1), tied=False, recompute="selective"),
    ],
    4: [
        replace(BIG, heads=(6, 3), recompute="full", labels="all"),
        Case(heads=(4, 1), qk_norm=True, labels="none"),
        Case(heads=(8, 2), qkv_bias=True, recompute="selective", grid=(1, 5)),
    ],
    5: [replace(BIG, heads=(6, 3)), Case(heads=(6, 2), qkv_bias=True, recompute="full", packed=True)],
}


def exactness(rank: int, num_ranks: int) -> list[tuple[list[str], dict[str, str]]]:
    """Of each case what went wrong, and the digest of every gradient."""
    found = []
    for case in CASES[num_ranks]:
        want, ledger = alone(case), Ledger()
        got, cuts = on_rank(case, ledger)
        errors = {"loss": error(got.loss, want.loss), "logits": error(got.logits, want.logits)}
        for name, gradient in got.gradients.items():
            whole = want.gradients[name]
            scale = float(whole.abs().max()) or 1.0
            errors[name] = error(gradient / scale, part_of(whole, cuts[name].box(rank)) / scale)
        wrong = [f"{name} is off by {off:.1e}: {case}" for name, off in errors.items() if not off < 1e-10]
        wrong += wrong_bytes(case, ledger, cuts, rank)
        found.append((wrong, {name: digest(tensor) for name, tensor in got.gradients.items()}))
    return found


def wrong_bytes(case: Case, ledger: Ledger, cuts: dict, rank: int) -> list[str]:
    facts = case.grid, 10, dist.get_world_size(), 2, torch.float64
    vocabulary = cuts["embedding.weight"]
    expected = {
        "replicas": replica_bytes(cuts, rank, torch.float64),
        "tensor": tensor_bytes(*facts, vocabulary=vocabulary, recompute=case.recompute)
        + logits_bytes(case, vocabulary),
    }
    return [
        f"{ledger.bytes(purpose)} bytes for {purpose}, not {want}: {case}"
        for purpose, want in expected.items()
        if ledger.bytes(purpose) != want
    ]


def logits_bytes(case: Case, vocabulary) -> int:
    """A pass for logits: as one without a loss, then the logits themselves."""
    facts = case.grid, 10, dist.get_world_size(), 2, torch.float64
    largest, tokens = max(size for _, size in vocabulary.parts), case.grid[0] * case.grid[1]
    moves = tensor_bytes(*facts, backward=False)
    one = tensor_bytes(case.grid, 10, dist.get_world_size(), 0, torch.float64, backward=False)
    return moves + one + (dist.get_world_size() - 1) * tokens * largest * 8


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("num_ranks", sorted(CASES))
def test_exact_on_any_number_of_ranks(world, num_ranks):

    results = world(exactness, num_ranks, num_ranks)
    wrong = [problem for found in results for problems, _ in found for problem in problems]
    assert not wrong, "\n".join(wrong[:10])
    for number, case in enumerate(CASES[num_ranks]):
        cuts = tensor_cuts(make(case, torch.float64), num_ranks)
        for name, cut in cuts.items():
            for rank in range(num_ranks):
                bits = {results[holder][number][1][name] for holder in cut.holders(rank)}
                assert len(bits) == 1, f"{name} differs on the ranks that hold it alike: {case}"
