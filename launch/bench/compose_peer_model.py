"""The Llama that `bench compose` assembles by hand: plain torch, names of parameters as in train/model/transformer.py.

Written as one would for torch's own parallelisms: `nn.Linear`, `nn.RMSNorm`, `scaled_dot_product_attention`, rotary
tables made once. Shapes: tokens (batch, seq), hidden (batch, seq, dim); between blocks of tensor ranks (batch, seq /
ranks, dim).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.train.model.shape import ModelConfig
from armillary.train.model.transformer import initial


class Attention(nn.Module):
    """Grouped-query self-attention; heads follow from the projections, which tensor parallelism divides."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.grouped = config.head_size, config.kv_heads != config.num_heads
        width, kv_width = config.num_heads * config.head_size, config.kv_heads * config.head_size
        self.query = nn.Linear(config.dim, width, bias=False)
        self.key = nn.Linear(config.dim, kv_width, bias=False)
        self.value = nn.Linear(config.dim, kv_width, bias=False)
        self.output = nn.Linear(width, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        q, k, v = (
            part(x).view(batch, seq, -1, self.head_dim).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return self.output(out.transpose(1, 2).reshape(batch, seq, -1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.hidden, bias=False)
        self.up = nn.Linear(config.dim, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.ffn(self.ffn_norm(x))


class Llama(nn.Module):
    """The model, or one stage of it: what the stage does not hold is None, or missing among the blocks."""

    def __init__(self, config: ModelConfig, seq: int) -> None:
        super().__init__()
        self.embedding: nn.Module | None = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleDict({str(number): Block(config) for number in range(config.num_layers)})
        self.norm: nn.Module | None = nn.RMSNorm(config.dim, config.norm_eps)
        self.output: nn.Module | None = nn.Linear(config.dim, config.vocab_size, bias=False)
        half = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
        angles = torch.outer(torch.arange(seq, dtype=torch.float32), config.rope_theta**-half)
        angles = torch.cat([angles, angles], dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens, or the hidden of the stage before -> logits (batch, seq, vocab), or hidden."""
        x = x if self.embedding is None else self.embedding(x)
        for block in self.blocks.values():
            x = block(x, self.cos, self.sin)
        x = x if self.norm is None else self.norm(x)
        return x if self.output is None else self.output(x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of x (batch, heads, seq, head_dim), halves as pairs, as in Hugging Face's Llama."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def initialised(config: ModelConfig, seq: int) -> Llama:
    """A whole model with the weights that ours begins with."""
    model = Llama(config, seq)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial(name, tuple(parameter.shape), config.num_layers, config.seed))
    return model


def keep_stage(model: Llama, layers: range, first: bool, last: bool) -> Llama:
    """Drops all that is not in a stage, in place."""
    for number in [number for number in model.blocks if int(number) not in layers]:
        del model.blocks[number]
    if not first:
        model.embedding = None
    if not last:
        model.norm = model.output = None
    return model
