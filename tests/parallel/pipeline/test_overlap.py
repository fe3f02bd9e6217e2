"""An overlap is computed as one: a forward and a backward at once, on two threads."""

import threading

import pytest
from pipeline_cases import Case, divisor_of, parts_of, pipeline_of

from armillary.comm.ledger import Ledger
from armillary.parallel.pipeline.stage import Stage
from armillary.parallel.pipeline.torch_runtime import Runtime

CASE = Case("dualpipev", num_parts=8, overlap=True)


def together(rank: int) -> tuple[int, int]:
    """How many actions met another while they computed; how many overlaps the schedule has."""
    pipeline, _ = pipeline_of(CASE, Ledger())
    # Each part of an overlap waits inside its computation for the other: one after the other, it would wait for ever.
    both, met = threading.Barrier(2), []
    overlapped = Runtime._overlapped
    inside = False

    def meeting(method):
        def call(self, *args, **options):
            if inside:
                both.wait(timeout=20)
                met.append(threading.current_thread().name)
            return method(self, *args, **options)

        return call

    def watched(self, action, ctx):
        nonlocal inside
        inside = True
        overlapped(self, action, ctx)
        inside = False

    Stage.forward_one_chunk = meeting(Stage.forward_one_chunk)
    Stage.backward_one_chunk = meeting(Stage.backward_one_chunk)
    pipeline._runtime._comp_type_to_function_map = {
        kind: watched.__get__(pipeline._runtime) for kind in pipeline._runtime._comp_type_to_function_map
    }
    pipeline.forward_backward(parts_of(CASE, 0), divisor_of(0))
    assert len(set(met)) == 2
    return len(met), sum(bool(action.parts) for action in pipeline.schedule.orders[rank])


def test_both_parts_compute_at_once(world):
    for met, overlaps in world(together, 2):
        assert met == 2 * overlaps > 0


def failing(rank: int) -> str:
    pipeline, _ = pipeline_of(CASE, Ledger())
    backward = Stage.backward_one_chunk

    def broken(self, micro_batch, **options):
        if threading.current_thread() is not threading.main_thread():
            raise FloatingPointError("planted")
        backward(self, micro_batch, **options)

    Stage.backward_one_chunk = broken
    pipeline.forward_backward(parts_of(CASE, 0), divisor_of(0))
    return ""


def test_what_fails_on_the_other_thread_is_raised(world, rank_failure):
    with pytest.raises(rank_failure, match="FloatingPointError: planted"):
        world(failing, 2)
