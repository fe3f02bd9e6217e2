"""The model: a decoder-only transformer of the Llama family, which knows nothing of ranks.

Shapes: tokens, labels (batch, seq); hidden (batch, seq, dim); queries (batch, seq, heads, head_dim), keys and values
(batch, seq, kv_heads, head_dim).

Seams are modules without parameters that do nothing here, where a plan may put communication: `enter` and `leave`
around the projections of attention and feed-forward, `core` between them, `head` at the end.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from armillary.kernels.attention.call import attention
from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places
from armillary.kernels.cross_entropy import IGNORE, linear_cross_entropy
from armillary.kernels.norm import add_rms_norm, rms_norm
from armillary.kernels.rope import frequencies, rotate_qk, tables
from armillary.kernels.swiglu import swiglu
from armillary.train.model.shape import ModelConfig

__all__ = ["IGNORE", "Attention", "Block", "FeedForward", "Transformer", "initialise"]


class Shared:
    """What all blocks of one forward pass share: the tokens' places and the rotary tables for them.

    A plain class on purpose: FSDP's mixed precision casts every tensor that it finds in arguments, also inside tuples
    and dataclasses, and the tables must stay in float32.
    """

    def __init__(self, places: Places, cos: Tensor, sin: Tensor) -> None:
        self.places, self.cos, self.sin = places, cos, sin

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and tokens a row."""
        return self.places.batch, self.places.seq


class RMSNorm(nn.Module):
    """See kernels/norm.py. Given a residual too, returns the norm of the sum, and the sum."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return rms_norm(x, self.weight, self.eps)
        return add_rms_norm(x, residual, self.weight, self.eps)


class Enter(nn.Module):
    """The seam before projections: from hidden as the residual stream has it to hidden of the `grid` (batch, seq)."""

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return x


class Leave(nn.Module):
    """The seam after projections: the reverse of `Enter`."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Core(nn.Module):
    """The seam: attention over keys that are all here. A plan may put its own module in this one's place.

    Called with q, k, v and the pass's `Places`, which are data of the host; returns q's shape. It has no parameters;
    `mask` is the model's, which another core in its place must heed.
    """

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
        return attention(q, k, v, places, mask=self.mask).out


class Head(nn.Module):
    """The seam at the end: from hidden, the output matrix (vocab, dim) and labels to logits or the loss's sum."""

    def forward(self, x: Tensor, weight: Tensor, labels: Tensor | None, grid: tuple[int, int]) -> Tensor:
        return F.linear(x, weight) if labels is None else linear_cross_entropy(x, weight, labels)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_size
        width, kv_width = config.num_heads * config.head_size, config.kv_heads * config.head_size
        self.query = nn.Linear(config.dim, width, bias=config.qkv_bias)
        self.key = nn.Linear(config.dim, kv_width, bias=config.qkv_bias)
        self.value = nn.Linear(config.dim, kv_width, bias=config.qkv_bias)
        self.output = nn.Linear(width, config.dim, bias=False)
        self.query_norm = RMSNorm(config.head_size, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(config.head_size, config.norm_eps) if config.qk_norm else nn.Identity()
        self.enter: nn.Module = Enter()
        self.core: nn.Module = Core(Mask(window=config.window or 0))
        self.leave: nn.Module = Leave()

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        x = self.enter(x, shared.grid)
        # The number of heads follows from the projections, which a plan may have divided.
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)) for part in (self.query, self.key, self.value))
        q, k = rotate_qk(self.query_norm(q), self.key_norm(k), shared.cos, shared.sin)
        return self.leave(self.output(self.core(q, k, v, shared.places).flatten(-2)))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.hidden, bias=False)
        self.up = nn.Linear(config.dim, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.dim, bias=False)
        self.enter: nn.Module = Enter()
        self.leave: nn.Module = Leave()

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        x = self.enter(x, shared.grid)
        return self.leave(self.down(swiglu(self.gate(x), self.up(x))))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on the normalised stream and added back to it.

    `recompute` says what of the forward pass is not kept for backward, but computed again there: nothing; the
    feed-forward half, which holds most of the memory and no attention ("selective"); all but the input ("full").
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)
        self.recompute = "none"
        self.compiled = False

    def compile(self, **options: Any) -> None:
        """torch.compile of the layer, inside of what `recompute` computes again: around it a compiler gives up, since
        there is what it cannot compile in it."""
        self._layer = torch.compile(self._layer, **options)  # type: ignore[method-assign]
        self.compiled = True

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        if self.recompute == "full":
            return again(self._layer, x, shared)
        return self._layer(x, shared)

    def _layer(self, x: Tensor, shared: Shared) -> Tensor:
        attended = self.attention(self.attention_norm(x), shared)
        if self.recompute == "selective":
            return again(self._feed_forward, attended, x, shared)
        return self._feed_forward(attended, x, shared)

    def _feed_forward(self, attended: Tensor, x: Tensor, shared: Shared) -> Tensor:
        normed, x = self.ffn_norm(attended, residual=x)
        return x + self.ffn(normed, shared)


def again(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`function(*inputs)`, of which only the inputs are kept for backward, where it is computed again."""
    # No layer draws random numbers, so there is no state of a generator to keep.
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Transformer(nn.Module):
    """The whole model, or after a plan has cut it the stretch of layers of one pipeline stage.

    It keeps no buffers, so it may be built on the meta device, allocated, then initialised. `output` is None when the
    embedding's own matrix projects to the vocabulary: one parameter with one name, which neither allocation nor a
    checkpoint can split in two. Blocks are called by their number in the whole model.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.begins = self.ends = True
        self.embedding: nn.Module = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleDict({str(number): Block(config) for number in range(config.num_layers)})
        self.norm: nn.Module = RMSNorm(config.dim, config.norm_eps)
        self.output = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.head: nn.Module = Head()

    def forward(self, x: Tensor, places: Places | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits of the next token, or the loss over `labels`; of a stage that is not the last, hidden.

        Args:
            x: token ids (batch, seq); hidden as the stage before gave it if the model does not begin here.
            places: document of each token, which attention never crosses, and position in it; in any order. None for
                one document a row, in order, of a model that begins here.
            labels: the token to predict at each place, or IGNORE.

        Returns:
            Without labels the logits (batch, seq, vocab); with labels the SUM of the cross entropy over labelled
            tokens, 0-d, float32 (float64 for a float64 model).
        """
        places = Places.in_order(*x.shape) if places is None else places
        if self.begins:
            x = self.embedding(x)
        shared = self._shared(x, places)
        for block in self.blocks.values():
            x = block(x, shared)
        if not self.ends:
            return x
        # Read here, inside the root's forward pass, where FSDP has gathered the root's own parameters.
        weight = self.embedding.weight if self.output is None else self.output.weight
        return self.head(self.norm(x), weight, labels, shared.grid)

    def _shared(self, x: Tensor, places: Places) -> Shared:
        scaling = self.config.rope_scaling
        positions = places.positions(x.device)
        # Where all rows are alike, one row of the tables serves them.
        positions = positions[:1] if places.rows_alike else positions
        frequency = frequencies(
            self.config.head_size,
            self.config.rope_theta,
            None if scaling is None else dataclasses.astuple(scaling),
            x.device,
        )
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return Shared(places, *tables(positions, frequency, wide))


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """Fills every parameter of a whole model in place: see `initial`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial(name, tuple(parameter.shape), model.config.num_layers, seed))


def initial(name: str, shape: tuple[int, ...], num_layers: int, seed: int) -> Tensor:
    """The initial values of a whole parameter, float32 on the CPU; they depend on nothing but the arguments.

    Norms are 1, biases 0, matrices normal with deviation 0.02, divided by sqrt(2 * layers) where they add to the
    residual stream. Source: GPT-2.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape, device="cpu")
    if name.endswith("bias"):
        return torch.zeros(shape, device="cpu")
    # Hashed together: the CPU generator looks at the low 32 bits of its seed only.
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    adds = name.endswith(("attention.output.weight", "ffn.down.weight"))
    deviation = 0.02 / (2 * num_layers) ** 0.5 if adds else 0.02
    return torch.empty(shape, device="cpu").normal_(0, deviation, generator=generator)
