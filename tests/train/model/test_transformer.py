"""The model: that of Hugging Face in number, blind to packing, and the same however it was built."""

import ast
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from armillary.kernels import cross_entropy, norm, rope, swiglu
from armillary.kernels.attention import call as attention
from armillary.kernels.attention.places import Places
from armillary.kernels.attention.reference import reference
from armillary.kernels.attention.tiles import Tile
from armillary.train.model import transformer as module
from armillary.train.model.shape import ModelConfig, RopeScaling
from armillary.train.model.transformer import IGNORE, Transformer, initial, initialise

TINY: dict[str, Any] = {"dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48, "vocab_size": 61}
SCALING = RopeScaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=64)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 1000.0, "rope_scaling": SCALING, "tie_embeddings": False},
    "llama-tied": {"rope_theta": 10_000.0, "tie_embeddings": True},
    "qwen2": {"rope_theta": 10_000.0, "tie_embeddings": True, "qkv_bias": True, "norm_eps": 1e-6},
    "qwen3": {"rope_theta": 10_000.0, "tie_embeddings": False, "qk_norm": True, "head_dim": 20, "norm_eps": 1e-6},
}
NAMES = [
    ("model.layers.", "blocks."),
    ("model.embed_tokens", "embedding"),
    ("model.norm", "norm"),
    ("lm_head", "output"),
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_norm", "attention.query_norm"),
    ("self_attn.k_norm", "attention.key_norm"),
    ("self_attn.q_proj", "attention.query"),
    ("self_attn.k_proj", "attention.key"),
    ("self_attn.v_proj", "attention.value"),
    ("self_attn.o_proj", "attention.output"),
    ("mlp.gate_proj", "ffn.gate"),
    ("mlp.up_proj", "ffn.up"),
    ("mlp.down_proj", "ffn.down"),
]


def build(dtype: torch.dtype = torch.float64, seed: int = 1, **changes: Any) -> Transformer:
    """A model whose every parameter is random, so that no norm or bias is without effect."""
    model = Transformer(ModelConfig(**(TINY | changes))).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
            parameter.copy_(noise + 1 if name.endswith("norm.weight") else noise)
    return model


Sharded = tuple[float, dict[str, Any], list[str]]


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def our_name(name: str) -> str:
    for theirs, ours in NAMES:
        name = name.replace(theirs, ours)
    return name


def hugging_face(family: str, config: ModelConfig) -> nn.Module:
    import transformers

    scaling = config.rope_scaling
    rope_parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling is not None:
        rope_parameters |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    prefix = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family.split("-")[0]]
    theirs = getattr(transformers, f"{prefix}Config")(
        hidden_size=config.dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_size,
        intermediate_size=config.hidden,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope_parameters,
        rope_scaling=rope_parameters,
        rope_theta=config.rope_theta,
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="sdpa",
    )
    return getattr(transformers, f"{prefix}ForCausalLM")(theirs)


class Float64Rotary(nn.Module):
    """Hugging Face's tables in float64: it has them in float32 only."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        half = config.head_size // 2
        inverse = torch.tensor([config.rope_theta ** (-i / half) for i in range(half)], dtype=torch.float64)
        if (s := config.rope_scaling) is not None:
            wavelength = 2 * torch.pi / inverse
            smooth = (s.original_length / wavelength - s.low_frequency_factor) / (
                s.high_frequency_factor - s.low_frequency_factor
            )
            blended = (1 - smooth) * inverse / s.factor + smooth * inverse
            inverse = torch.where(
                wavelength > s.original_length / s.low_frequency_factor,
                inverse / s.factor,
                torch.where(wavelength < s.original_length / s.high_frequency_factor, inverse, blended),
            )
        self.inverse = inverse

    def forward(self, x: Tensor, position_ids: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * self.inverse
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def widen(theirs: Any, config: ModelConfig) -> None:
    """Makes a Hugging Face model compute in float64 throughout."""
    theirs.double()
    theirs.model.rotary_emb = Float64Rotary(config)
    for part in theirs.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = lambda x, n=part: n.weight * x * torch.rsqrt(x.square().mean(-1, True) + n.variance_epsilon)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_is_hugging_faces_model(family: str, dtype: torch.dtype, tolerance: float) -> None:
    """Logits, loss and every gradient; in float32 with Hugging Face's model untouched."""
    ours = build(dtype, **FAMILIES[family])
    theirs = hugging_face(family, ours.config).to(dtype)
    if dtype == torch.float64:
        widen(theirs, ours.config)
    mine = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(mine[our_name(name)])
    tokens, labels = ids(2, 90), ids(2, 90, seed=1)
    logits = theirs(tokens).logits
    assert (ours(tokens) - logits).abs().max() < tolerance * logits.abs().max()
    loss = ours(tokens, labels=labels)
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    loss.backward()
    assert {our_name(name) for name, _ in theirs.named_parameters()} == set(mine)
    for name, parameter in theirs.named_parameters():
        gradient, truth = mine[our_name(name)].grad, parameter.grad
        assert gradient is not None
        assert truth is not None
        assert (gradient - truth).norm() <= 10 * tolerance * truth.norm(), name


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans(), st.integers(0, 99))
def test_packed_documents_are_each_document_alone(lengths: list[int], shuffle: bool, seed: int) -> None:
    """Loss, logits and gradients of two rows packed differently; also when their tokens stand in any order."""
    model = build(qk_norm=True)
    rows, total = (lengths, lengths[::-1]), sum(lengths)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)) if shuffle else torch.arange(total)
    tokens, labels = ids(2, total, seed=seed), ids(2, total, seed=seed + 1)
    labels[0, seed % total] = IGNORE
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    documents = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows])

    places = Places.of(positions[:, order], documents[:, order])
    packed = model(tokens[:, order], places, labels[:, order])
    gradients = torch.autograd.grad(packed, list(model.parameters()))
    logits = model(tokens[:, order], places)
    alone, losses = [], []
    for row, t, x in zip(rows, tokens, labels, strict=True):
        alone.append(torch.cat([model(part[None])[0] for part in t.split(row)]))
        losses += [model(a[None], labels=b[None]) for a, b in zip(t.split(row), x.split(row), strict=True)]
    torch.testing.assert_close(logits, torch.stack(alone)[:, order], rtol=0, atol=1e-11)
    torch.testing.assert_close(packed, torch.stack(losses).sum(), rtol=1e-12, atol=1e-12)
    truth = torch.autograd.grad(torch.stack(losses).sum(), list(model.parameters()))
    torch.testing.assert_close(gradients, truth, rtol=1e-9, atol=1e-11)


def test_left_out_places_are_one_document_in_order() -> None:
    model, tokens = build(), ids(2, 12)
    count = torch.arange(12).expand(2, 12)
    assert torch.equal(model(tokens), model(tokens, Places.of(count)))
    # By way of the mask: another order of the rows' tokens, put back.
    flipped = model(tokens.flip(1), Places.of(count.flip(1))).flip(1)
    torch.testing.assert_close(model(tokens), flipped, rtol=0, atol=1e-12)


def test_loss_is_the_sum_over_labelled_tokens() -> None:
    model, tokens, labels = build(), ids(3, 10), ids(3, 10, seed=1)
    labels[0], labels[1, 3] = IGNORE, IGNORE
    logits = model(tokens)
    terms = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE)
    loss = model(tokens, labels=labels)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, terms.sum(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_label_gives_zero_loss_and_zero_gradients(dtype: torch.dtype) -> None:
    model, tokens = build(dtype, qkv_bias=True, qk_norm=True, tie_embeddings=False), ids(2, 6)
    loss = model(tokens, labels=torch.full_like(tokens, IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_a_tied_matrix_is_one_parameter_with_both_gradients() -> None:
    tied, free = build(tie_embeddings=True), build(tie_embeddings=False)
    with torch.no_grad():
        for name, parameter in free.named_parameters():
            parameter.copy_(tied.get_parameter("embedding.weight" if name == "output.weight" else name))
    names = [name for name, _ in tied.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) == len(list(free.parameters())) - 1
    tokens, labels = ids(2, 9), ids(2, 9, seed=1)
    for model in (tied, free):
        model(tokens, labels=labels).backward()
    assert free.output is not None
    both, looked_up, projected = (part.weight.grad for part in (tied.embedding, free.embedding, free.output))
    assert looked_up is not None
    assert projected is not None
    torch.testing.assert_close(both, looked_up + projected, rtol=1e-12, atol=1e-12)


def test_bfloat16_stays_near_float64() -> None:
    tokens, labels = ids(4, 60), ids(4, 60, seed=1)
    truth = build()(tokens, labels=labels)
    loss = build(torch.bfloat16)(tokens, labels=labels)
    torch.testing.assert_close(loss.double(), truth, rtol=5e-3, atol=0)


def test_meta_build_is_direct_build() -> None:
    config = ModelConfig(**TINY, qk_norm=True, qkv_bias=True)
    with torch.device("meta"):
        late = Transformer(config)
    assert not list(late.buffers())
    late.to_empty(device="cpu")
    direct = Transformer(config)
    for model in (late, direct):
        initialise(model, 7)
    for (name, a), (_, b) in zip(late.named_parameters(), direct.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(late(ids(1, 5)), direct(ids(1, 5)))


def test_initial_values() -> None:
    model = Transformer(ModelConfig(dim=128, num_layers=8, num_heads=4, vocab_size=512, qkv_bias=True))
    initialise(model, 0)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            adds = name.endswith(("attention.output.weight", "ffn.down.weight"))
            assert parameter.std().item() == pytest.approx(0.02 / (4 if adds else 1), rel=0.05), name
            assert abs(parameter.mean().item()) < 0.001


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    def values(seed: int, **changes: Any) -> dict[str, Tensor]:
        model = Transformer(ModelConfig(**(TINY | changes)))
        initialise(model, seed)
        return dict(model.named_parameters())

    shallow, deep = values(0), values(0, num_layers=3, tie_embeddings=False)
    name = "blocks.1.attention.query.weight"
    assert torch.equal(shallow[name], deep[name])
    assert not torch.equal(deep[name], deep["blocks.2.attention.query.weight"])
    # Seeds that agree in their low 32 bits are different seeds.
    assert not any(torch.equal(shallow[name], values(seed)[name]) for seed in (1, 2**32, 2**40))


def test_the_attention_core_is_replaceable() -> None:
    class WrittenOut(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
            assert q.shape == (2, 6, 4, 8)
            assert k.shape == v.shape == (2, 6, 2, 8)
            assert (places.batch, places.seq) == (2, 6)
            return reference(q, k, v, Tile(places, places, attention.CAUSAL, 8**-0.5))[0]

    model, tokens = build(), ids(2, 6)
    before = model(tokens)
    for block in model.blocks.values():
        block.get_submodule("attention").core = WrittenOut()
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("part", [module, attention, cross_entropy, norm, rope, swiglu])
def test_knows_nothing_of_ranks(part: Any) -> None:
    tree = ast.parse(Path(part.__file__).read_text())
    imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [
        name for name in imported if "distributed" in name or name.startswith(("armillary.comm", "armillary.p"))
    ]
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "distributed"]


def sharded(rank: int, compute: str, changes: dict[str, Any]) -> Sharded:
    """One rank of two: half of the batch; its loss, the whole gradients and the dtypes inside a block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import distribute_tensor

    dtype = getattr(torch, compute)
    with torch.device("meta"):
        model = Transformer(ModelConfig(**(TINY | changes)))
    mesh = init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in (*model.blocks.values(), model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    model.to_empty(device="cpu")
    for name, p in model.named_parameters():
        full = initial(name, tuple(p.shape), model.config.num_layers, 3)
        p.data.copy_(distribute_tensor(full, p.device_mesh, p.placements))  # type: ignore[attr-defined]
    seen: list[str] = []

    def look(block: nn.Module, args: tuple[Any, ...]) -> None:
        x, shared = args
        seen[:] = [str(t.dtype) for t in (x, block.get_parameter("attention_norm.weight"), shared.cos, shared.sin)]

    model.blocks["1"].register_forward_pre_hook(look)
    tokens, labels = (t.chunk(2)[rank] for t in (ids(4, 20), ids(4, 20, seed=1)))
    documents = (torch.arange(20) >= 13).int().expand(2, 20)
    positions = (torch.arange(20) - 13 * documents).expand(2, 20)
    loss = model(tokens, Places.of(positions, documents), labels)
    loss.backward()
    # FSDP averages over the ranks; the loss is a sum.
    gradients = {name: (p.grad.full_tensor() * 2).numpy() for name, p in model.named_parameters()}  # type: ignore
    return loss.item(), gradients, seen


SHARDED = list(itertools.product(("float32", "bfloat16"), ({}, {"tie_embeddings": False, "qk_norm": True})))


def all_sharded(rank: int) -> list[Sharded]:
    return [sharded(rank, compute, changes) for compute, changes in SHARDED]


@pytest.fixture(scope="module")
def on_two(world: Callable[..., list[Any]]) -> list[list[Sharded]]:
    return world(all_sharded, 2)


@pytest.mark.parametrize("case", range(len(SHARDED)), ids=lambda case: str(SHARDED[case]))
def test_sharded_by_fsdp(on_two: list[list[Sharded]], case: int) -> None:
    (compute, changes), results = SHARDED[case], [of_rank[case] for of_rank in on_two]
    tolerance = {"float32": 1e-5, "bfloat16": 3e-2}[compute]
    model = Transformer(ModelConfig(**(TINY | changes)))
    initialise(model, 3)
    documents = (torch.arange(20) >= 13).int().expand(4, 20)
    positions = (torch.arange(20) - 13 * documents).expand(4, 20)
    loss = model(ids(4, 20), Places.of(positions, documents), ids(4, 20, seed=1))
    loss.backward()
    assert sum(result[0] for result in results) == pytest.approx(loss.item(), rel=tolerance / 10)
    for _, gradients, seen in results:
        assert seen == [f"torch.{compute}"] * 2 + ["torch.float32"] * 2
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            error = (torch.from_numpy(gradients[name]) - parameter.grad).norm() / parameter.grad.norm()
            assert error < tolerance, name


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_block_is_compiled_whatever_it_computes_again(recompute):
    """Around a recomputed layer the compiler would give up, without a word, and compile nothing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = ModelConfig(dim=24, num_layers=2, num_heads=3, vocab_size=32)
    plain, compiled = Transformer(config).double(), Transformer(config).double()
    tokens = torch.randint(0, 32, (2, 16), generator=torch.Generator().manual_seed(0))
    for model in (plain, compiled):
        initialise(model, 0)
    for block in compiled.blocks.values():
        block.recompute = recompute
        block.attention.core.forward = torch.compiler.disable(block.attention.core.forward)
        block.compile(backend="aot_eager")
    for model in (plain, compiled):
        model(tokens, None, tokens).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for name, parameter in compiled.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad, rtol=0, atol=1e-12)
