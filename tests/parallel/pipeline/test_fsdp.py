"""FSDP inside a pipeline: exact, and gathered and reduced once a step."""

import pytest
import torch
import torch.distributed as dist
from pipeline_cases import Case, parts_of, pipeline_of, problems, run_pipeline
from torch.distributed.device_mesh import init_device_mesh

from armillary.comm.ledger import Ledger
from armillary.parallel.partition import shard
from armillary.parallel.plan import Partition

PIPELINE = 2


def sharded(case: Case, ledger: Ledger, compute: torch.dtype = torch.float64):
    """A pipeline of this rank's stages, each an FSDP root over pairs of ranks; the stages, and the rank in the pair."""
    mesh = init_device_mesh("cpu", (PIPELINE, 2), mesh_dim_names=("pp", "plane"))
    facts = {"mesh": mesh["plane"], "compute": compute, "ledger": ledger}
    group = mesh["pp"].get_group()
    made = pipeline_of(case, ledger, group, lambda stage: shard(stage, Partition(), **facts), compute)
    return *made, mesh["plane"].get_local_rank()


def on_rank(rank: int, case: Case):
    ledger = Ledger()
    pipeline, stages, copy_number = sharded(case, ledger)
    losses, sums, gradients = run_pipeline(case, pipeline, stages, ledger, rank // 2, copy_number)
    # Both ranks of a pair hold the same whole gradients and evaluated the same: count one.
    return losses, [value * (copy_number == 0) for value in sums], gradients if copy_number == 0 else {}


CASES = [
    Case("1f1b", num_parts=5),
    Case("interleaved", num_parts=3, tied=False, recompute="selective"),
    Case("zb1p", num_parts=4, tied=False, recompute="full"),
    Case("zbv", num_parts=5, recompute="selective", qk_norm=True),
    Case("dualpipev", num_parts=6, overlap=True, recompute="full", qkv_bias=True),
    Case("interleaved", num_parts=4, stages_per_rank=4),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_as_one_process(world, case):
    found = world(on_rank, 2 * PIPELINE, case)
    wrong = problems(found, case, case.plan(PIPELINE).num_stages, copies=2)
    assert not wrong, "\n".join(wrong)


def split_in_bf16(rank: int) -> float:
    """How far the gradients of a split backward are from those of a full one, of the largest, in bfloat16."""
    gradients = []
    for name in ("1f1b", "zb1p"):
        case = Case(name, num_parts=8)
        pipeline, stages, copy_number = sharded(case, Ledger(), torch.bfloat16)
        pipeline.forward_backward(parts_of(case, 0, copy_number), torch.tensor(3))
        gradients.append([parameter.grad.to_local() for stage in stages for parameter in stage.parameters()])
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*gradients, strict=True))


def test_gradients_that_were_put_off_add_up_in_float32(world):
    assert max(world(split_in_bf16, 2 * PIPELINE)) < 1e-4


def after_an_evaluation(rank: int) -> list[float]:
    """The loss of a step on changed weights, without and with an evaluation before the change, whose weights are still
    gathered."""
    case, losses = Case("1f1b", num_parts=2), []
    for evaluates in (False, True):
        pipeline, stages, copy_number = sharded(case, Ledger())
        shards = [parameter.to_local() for stage in stages for parameter in stage.parameters()]
        if evaluates:
            pipeline.loss(parts_of(case, 0, copy_number)[0])
        with torch.no_grad():
            for held in shards:
                held.mul_(1.5)
        losses.append(float(pipeline.forward_backward(parts_of(case, 0, copy_number), torch.tensor(3))))
    return losses


def test_a_step_gathers_what_an_evaluation_left_behind_anew(world):
    for without, after in world(after_an_evaluation, 2 * PIPELINE):
        assert without == after


def traffic(rank: int, cases: list[Case]) -> list[dict[str, int]]:
    """Bytes of a step of each case."""
    found = []
    for case in cases:
        ledger = Ledger()
        pipeline, _, copy_number = sharded(case, ledger)
        pipeline.forward_backward(parts_of(case, 0, copy_number), torch.tensor(3))
        dist.barrier()
        found.append(ledger.by_purpose())
    return found


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zbv"])
def test_weights_and_gradients_move_once_a_step(world, name):
    cases = [Case(name, num_parts=number, recompute="selective") for number in (2, 7)]
    for few, many in world(traffic, 2 * PIPELINE, cases):
        assert few["gradients"] == many["gradients"] > 0
        assert few["weights"] == many["weights"] == few["gradients"]
        assert few["pipeline"] < many["pipeline"]
