"""Tensor parallelism among other things: bfloat16, torch.compile, a pipeline's stages, context parallelism; and what
the exact tests say of planted mistakes."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from tensor_cases import Case, alone, compute, error, fill, make, on_rank, weights_of
from torch.distributed.device_mesh import init_device_mesh

from armillary.comm import collectives
from armillary.comm.ledger import Ledger
from armillary.kernels.attention.mask import Mask
from armillary.parallel.context.core import ContextCore
from armillary.parallel.context.layout import lay_out
from armillary.parallel.held import part_of
from armillary.parallel.partition import shard
from armillary.parallel.pipeline.cut_model import cut_to_stage
from armillary.parallel.pipeline.later import pay
from armillary.parallel.pipeline.split_backward import split_backward
from armillary.parallel.plan import Partition
from armillary.parallel.tensor import cut_model as tensor
from armillary.parallel.tensor import replicas as tensor_replicas
from armillary.parallel.tensor import stream as tensor_stream
from armillary.parallel.tensor.cut_model import cut_to_rank
from armillary.parallel.tensor.cuts import first_kv_head, tensor_cuts
from armillary.parallel.tensor.project import Enter, Pick
from armillary.parallel.tensor.replicas import sum_replicas

CASE = Case(heads=(6, 2), tied=False, qk_norm=True, qkv_bias=True, hidden=29, vocab=53)


def worst(case: Case, rank: int) -> float:
    want = alone(case)
    got, cuts = on_rank(case, Ledger())
    errors = [error(got.loss, want.loss), error(got.logits, want.logits)]
    errors += [error(g, part_of(want.gradients[name], cuts[name].box(rank))) for name, g in got.gradients.items()]
    return max(errors)


def mistaken(rank: int, mistake: str) -> float:
    if mistake == "no sum over replicas":
        tensor_replicas.all_reduce = lambda flat, **_: flat
    elif mistake == "no sum over those who share a key head":
        tensor_replicas._sum_in_order = lambda flat, *_: flat
    elif mistake == "embedding's first token":
        embedding = tensor.VocabEmbedding
        tensor.VocabEmbedding = lambda weight, first, stream: embedding(weight, first + (first > 0), stream)
    elif mistake == "head's first token":
        head = tensor.VocabHead

        def shifted(cut, stream):
            made = head(cut, stream)
            made.shard = replace(made.shard, first=max(0, made.shard.first - 1))
            return made

        tensor.VocabHead = shifted
    return worst(CASE, rank)


MISTAKES = [
    "none",
    "no sum over replicas",
    "no sum over those who share a key head",
    "embedding's first token",
    "head's first token",
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(world, mistake):
    found = world(mistaken, 3, mistake)
    assert all(off < 1e-10 for off in found) if mistake == "none" else max(found) > 1e-3 or max(found) != max(found)


def bf16_errors(rank: int, case: Case) -> list[tuple[str, float, float]]:
    """Of loss and gradients the squared error of this rank's parts, and of the same parts of one process."""
    truth, one = (alone(case, dtype) for dtype in (torch.float64, torch.bfloat16))
    got, cuts = on_rank(case, Ledger(), torch.bfloat16)
    pairs = [("loss", got.loss, one.loss, truth.loss), ("logits", got.logits, one.logits, truth.logits)]
    for name, gradient in got.gradients.items():
        if cuts[name].speaks(rank):
            whole = (part_of(result.gradients[name], cuts[name].box(rank)) for result in (one, truth))
            pairs.append((name.rsplit(".", 2)[-2], gradient, *whole))
    found = []
    for name, ours, ones, want in pairs:
        squares = (float((tensor.double() - want).square().sum()) for tensor in (ours, ones))
        found.append((name, *squares))
    return found


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_bf16_is_within_twice_the_error_of_one_process(world, num_ranks):
    """Layer by layer, the sums over their parameters. Weights and gradients are bfloat16 throughout."""
    case = replace(CASE, heads=(8, 2), grid=(4, 31), labels="all")
    totals: dict[str, list[float]] = {}
    for found in world(bf16_errors, num_ranks, case):
        for name, ours, ones in found:
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += ours
            total[1] += ones
    print({name: (ours / ones) ** 0.5 for name, (ours, ones) in totals.items()})
    wrong = {name: (ours / ones) ** 0.5 for name, (ours, ones) in totals.items() if not ours <= 4 * ones}
    assert not wrong


def stage_of(case: Case, number: int, cuts: dict, ledger: Ledger) -> torch.nn.Module:
    """One of two stages of a block each."""
    stage = make(case, torch.float64)
    cut_to_stage(stage, range(number, number + 1), number == 0, number == 1)
    cut_to_rank(stage, cuts, group=dist.group.WORLD, ledger=ledger)
    fill(stage, weights_of(case, torch.float64), cuts, dist.get_rank())
    return stage


def staged(rank: int, case: Case, split: bool) -> list[str]:
    """Two stages on the same ranks; what the first gives is the second's input."""
    group, ledger, want = dist.group.WORLD, Ledger(), alone(case)
    cuts = tensor_cuts(make(case, torch.float64), group.size())
    stages = [stage_of(case, number, cuts, ledger) for number in range(2)]
    laters = [split_backward(stage) for stage in stages] if split else []
    tokens, labels = case.tokens()
    hidden = stages[0](tokens, case.places())
    given = hidden.detach().requires_grad_()
    loss = stages[1](given, case.places(), labels)
    for later in laters:
        later.owed = []
    loss.backward()
    hidden.backward(given.grad)
    moved, wrong = ledger.bytes(), [] if error(loss, want.loss) < 1e-10 else ["loss"]
    for later in laters:
        wrong += [] if len(later.owed) == 7 else [f"{len(later.owed)} layers put off"]
        pay(later.owed)
    wrong += [] if ledger.bytes() == moved else ["bytes moved for weights that were put off"]
    gradients: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            gradients[name] = parameter.grad if name not in gradients else gradients[name] + parameter.grad
    sum_replicas(gradients, cuts, group=group, ledger=ledger)
    pairs = ((name, g, part_of(want.gradients[name], cuts[name].box(rank))) for name, g in gradients.items())
    return wrong + [name for name, got, whole in pairs if not error(got, whole) < 1e-10]


@pytest.mark.parametrize(("tied", "split"), [(True, False), (False, True)])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_stages_of_a_pipeline(world, tied, split, recompute):
    """Also with the gradients of the seven matrices of a block put off, biases with them."""
    case = replace(CASE, tied=tied, packed=True, recompute=recompute)
    assert world(staged, 3, case, split) == [[], [], []]


def compiled(rank: int) -> tuple[float, float]:
    """With a block compiled, apart from what communicates: the worst error, and of compiling how many frames."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    case, group = replace(CASE, recompute="selective"), dist.group.WORLD
    want, model = alone(case), make(case, torch.float64)
    cuts = tensor_cuts(model, group.size())
    cut_to_rank(model, cuts, group=group, ledger=Ledger())
    fill(model, weights_of(case, torch.float64), cuts, rank)
    block = model.blocks["0"]
    # Of the CPU's attention little can be traced, in many attempts.
    block.attention.core.forward = torch.compiler.disable(block.attention.core.forward)
    block.compile(backend="aot_eager")
    got = compute(model, case)
    sum_replicas(got.gradients, cuts, group=group, ledger=Ledger())
    errors = [error(g, part_of(want.gradients[name], cuts[name].box(rank))) for name, g in got.gradients.items()]
    return max(*errors, error(got.loss, want.loss)), torch._dynamo.utils.counters["frames"]["ok"]


def test_compiled_blocks(world):
    for off, frames in world(compiled, 2):
        assert off < 1e-10
        assert frames > 0


def order_of_events(rank: int) -> list[str]:
    """Of the backward pass of two projections."""
    events: list[str] = []
    start, matmul = tensor_stream.start_reduce_scatter, torch.Tensor.__matmul__
    wait = collectives.Scattering.wait

    def noted(name, function):
        def call(*args, **options):
            events.append(name)
            return function(*args, **options)

        return call

    stream = tensor_stream.Stream(dist.group.WORLD, Ledger())
    layers = [Pick(torch.nn.Linear(3, 2), number) for number in range(2)]
    out = Enter(layers, stream)(torch.randn(3, 3, requires_grad=True), (2, 3))
    tensor_stream.start_reduce_scatter = noted("start", start)
    collectives.Scattering.wait = noted("wait", wait)
    torch.Tensor.__matmul__ = noted("product", matmul)
    (out[0] * out[1]).sum().backward()
    return events


def test_hidden_goes_home_while_the_weights_gradients_are_computed(world):
    for events in world(order_of_events, 2):
        assert events == ["product", "start", "product", "product", "wait"]


def with_context(rank: int, strategy: str, cases: list[Case]) -> list[str]:
    """Tensor ranks are neighbours; each context group has one of each pair."""
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])]
    return [f"{name}: {case}" for case in cases for name in with_context_inside(rank, strategy, case, groups)]


def with_context_inside(rank: int, strategy: str, case: Case, groups: list[dist.ProcessGroup]) -> list[str]:
    tensors, context = groups[rank // 2], groups[2 + rank % 2]
    want, ledger, model = alone(case), Ledger(), make(case, torch.float64)
    cuts = tensor_cuts(model, 2)
    cut_to_rank(model, cuts, group=tensors, ledger=ledger)
    fill(model, weights_of(case, torch.float64), cuts, rank % 2)
    for block in model.blocks.values():
        first = first_kv_head(cuts, rank % 2, block.attention.head_dim)
        block.attention.core = ContextCore(strategy, group=context, ledger=ledger, mask=Mask(), first_head=first)
    places = case.places()
    layout = lay_out(places.positions().numpy(), places.documents().numpy(), 2, "zigzag")
    tokens, labels = (layout.take(t, rank // 2) for t in case.tokens())
    loss = model(tokens, layout.places(rank // 2), labels)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    sum_replicas(gradients, cuts, group=tensors, ledger=ledger)
    total = loss.detach().clone()
    for part in (total, *gradients.values()):
        dist.all_reduce(part, group=context)
    pairs = {name: (g, part_of(want.gradients[name], cuts[name].box(rank % 2))) for name, g in gradients.items()}
    return [name for name, pair in (pairs | {"loss": (total, want.loss)}).items() if not error(*pair) < 1e-10]


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "token_ring"])
def test_with_context_parallelism_inside(world, strategy):
    """Five query heads of one key head leave a context group 2 and 3 heads for Ulysses to share out;
    of one token a context group has a rank without any."""
    cases = [replace(CASE, packed=True), replace(CASE, heads=(5, 1), recompute="full"), replace(CASE, grid=(1, 1))]
    assert world(with_context, 4, strategy, cases) == [[], [], [], []]


def with_sharded_state(rank: int, case: Case, weights: str) -> list[str]:
    """Two tensor ranks, whose parts are sharded over two ranks with half of the rows each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    group, plane, want, ledger = mesh["tp"].get_group(), mesh["dp"], alone(case), Ledger()
    model, whole = make(case, torch.float64), weights_of(case, torch.float64)
    cuts = tensor_cuts(model, 2)
    cut_to_rank(model, cuts, group=group, ledger=ledger)
    shard(model, Partition(weights=weights), mesh=plane, compute=torch.float64, ledger=ledger)
    model.to_empty(device="cpu")
    named = dict(model.named_parameters())
    boxes = {name: cuts[name].shard(group.rank(), plane.get_local_rank(), 2) for name in named}
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.to_local().copy_(part_of(whole[name], boxes[name]))
    tokens, labels = (tensor.chunk(2)[plane.get_local_rank()] for tensor in case.tokens())
    for row in range(len(tokens)):  # one at a time: gradients are accumulated
        model.set_requires_gradient_sync(row == len(tokens) - 1)
        model(tokens[row : row + 1], None, labels[row : row + 1]).backward()
    gradients = {name: parameter.grad.to_local() for name, parameter in named.items()}
    sum_replicas(gradients, cuts, group=group, ledger=ledger)
    pairs = ((name, gradient, part_of(want.gradients[name], boxes[name])) for name, gradient in gradients.items())
    return [name for name, got, whole in pairs if not error(got, whole) < 1e-10]


@pytest.mark.parametrize(("weights", "recompute"), [("all", "none"), ("rank", "full")])
def test_with_state_sharded_over_the_data_plane(world, weights, recompute):
    """Also shards without rows: one key head's part is four rows, a norm's ten."""
    case = replace(CASE, heads=(4, 1), grid=(4, 5), recompute=recompute, qk_norm=True)
    assert world(with_sharded_state, 4, case, weights) == [[], [], [], []]
