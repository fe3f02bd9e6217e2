"""What a pipeline keeps, how long, and how often it computes."""

import gc
import weakref

import pytest
from pipeline_cases import Case, divisor_of, parts_of, pipeline_of

from armillary.comm.ledger import Ledger
from armillary.parallel.pipeline.stage import Stage
from armillary.train.model.transformer import Block


def most_kept(rank: int, case: Case) -> tuple[int, int, int]:
    """The most micro-batches a rank keeps at once between forward and backward, the most layers it owes; tensors of the
    stages that are alive after a step though nothing has collected cycles."""
    pipeline, stages = pipeline_of(case, Ledger())
    most, owed, alive = 0, 0, []
    for stage in stages:
        stage.register_forward_hook(lambda _, __, output: alive.append(weakref.ref(output)))
    forward, weights = Stage.forward_one_chunk, Stage.backward_weight_one_chunk

    def watched(self, *args, **options):
        nonlocal most
        output = forward(self, *args, **options)
        most = max(most, sum(len(stage._kept) for stage in pipeline._stages))
        return output

    def watched_weights(self, *args, **options):
        nonlocal owed
        owed = max(owed, sum(len(stage._owed) for stage in pipeline._stages))
        return weights(self, *args, **options)

    Stage.forward_one_chunk, Stage.backward_weight_one_chunk = watched, watched_weights
    gc.disable()
    pipeline.forward_backward(parts_of(case, 0), divisor_of(0))
    assert pipeline.is_clear
    return most, owed, sum(reference() is not None for reference in alive)


@pytest.mark.parametrize(
    ("case", "want"),
    [
        (Case("gpipe", num_parts=6), [(6, 0), (6, 0)]),
        (Case("1f1b", num_parts=6), [(2, 0), (1, 0)]),
        (Case("zb1p", num_parts=6), None),
        (Case("zbv", num_parts=6, recompute="full"), None),
    ],
    ids=str,
)
def test_keeps_what_the_schedule_says_and_frees_it(world, case, want):
    found = world(most_kept, 2, case)
    assert [result[2] for result in found] == [0, 0]
    if want:
        assert [result[:2] for result in found] == want
    else:
        assert all(most <= 4 and 1 <= owed <= 4 for most, owed, _ in found), found


def computed(rank: int, case: Case) -> list[int]:
    """How often each block of this rank computed its feed-forward half."""
    pipeline, stages = pipeline_of(case, Ledger())
    counts: dict[int, int] = {}
    half = Block._feed_forward

    def counted(self, *args):
        counts[id(self)] = counts.get(id(self), 0) + 1
        return half(self, *args)

    Block._feed_forward = counted
    pipeline.forward_backward(parts_of(case, 0), divisor_of(0))
    return [counts[id(block)] for stage in stages for block in stage.blocks.values()]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_split_backward_recomputes_once(world, recompute):
    want = 5 if recompute == "none" else 10
    for counts in world(computed, 2, Case("zbv", num_parts=5, recompute=recompute)):
        assert set(counts) == {want}


def two_numbers_of_parts(rank: int) -> str:
    pipeline, _ = pipeline_of(Case(num_parts=3), Ledger())
    try:
        pipeline.forward_backward(parts_of(Case(num_parts=2), 0), divisor_of(0))
    except ValueError as error:
        return str(error)
    return ""


def test_another_number_of_micro_batches_is_refused(world):
    assert all("2 parts for schedule 1f1b of 3" in text for text in world(two_numbers_of_parts, 2))
