"""The shape of a model, and what follows from it by arithmetic: parameters and floating-point operations.

Imports no torch, so that a config can be checked, priced and explained at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretch of the rotary frequencies for contexts longer than those of pretraining.

    Source: Llama 3.1 release, `rope_type = "llama3"`: wavelengths longer than `original_length / low_frequency_factor`
    are divided by `factor`, those shorter than `original_length / high_frequency_factor` are kept, and those between
    are blended.
    """

    __pydantic_config__ = {"extra": "forbid"}

    factor: float = field(default=8.0, metadata={"min": 1})
    """By how much the longest wavelengths are stretched."""
    low_frequency_factor: float = field(default=1.0, metadata={"above": 0})
    """Wavelengths above `original_length` over this are stretched in full."""
    high_frequency_factor: float = field(default=4.0, metadata={"above": 0})
    """Wavelengths below `original_length` over this are kept."""
    original_length: int = field(default=8192, metadata={"min": 1})
    """The context length, in tokens, of the pretraining."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.high_frequency_factor <= self.low_frequency_factor:
            yield "high_frequency_factor", "must be greater than low_frequency_factor"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer of the Llama family (RMSNorm, RoPE, grouped-query attention, SwiGLU)."""

    __pydantic_config__ = {"extra": "forbid"}

    dim: int = field(default=256, metadata={"min": 1})
    """Width of the residual stream."""
    num_layers: int = field(default=4, metadata={"min": 1})
    """Number of transformer blocks."""
    num_heads: int = field(default=8, metadata={"min": 1})
    """Query heads."""
    num_kv_heads: int | None = field(default=None, metadata={"min": 1})
    """Key and value heads (grouped-query attention); as many as query heads when left out."""
    head_dim: int | None = field(default=None, metadata={"min": 2})
    """Width of one head; `dim / num_heads` when left out."""
    ffn_dim: int | None = field(default=None, metadata={"min": 1})
    """Hidden width of the SwiGLU; `8/3 dim`, rounded up to a multiple of 32, when left out."""
    vocab_size: int = field(default=4096, metadata={"min": 2})
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    norm_eps: float = field(default=1e-5, metadata={"above": 0})
    """Added to the mean square in RMSNorm."""
    rope_theta: float = field(default=10_000.0, metadata={"above": 0})
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Llama 3's stretch of the rotary frequencies; none when left out."""
    tie_embeddings: bool = True
    """Whether the output projection is the embedding's own matrix."""
    qk_norm: bool = False
    """RMSNorm on each query and key head before RoPE (Qwen 3)."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen 2)."""
    window: int | None = field(default=None, metadata={"min": 1})
    """Tokens of its document that a query sees, itself and those just before it (Mistral); all when left out."""
    seed: int = field(default=0, metadata={"min": 0})
    """Seed of the initial weights; the same weights on any number of ranks."""
    weights: str = ""
    """Folder of a run of the same shape whose newest checkpoint has the initial weights; from `seed` when left out."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """What the fields do not allow together: pairs of key and sentence."""
        if self.head_dim is None and self.dim % self.num_heads:
            yield "num_heads", f"must divide model.dim = {self.dim}, or set model.head_dim"
        elif self.head_size % 2:
            yield "head_dim", f"is {self.head_size}; RoPE turns pairs, so it must be even"
        if self.num_heads % self.kv_heads:
            yield "num_kv_heads", f"must divide model.num_heads = {self.num_heads}"

    @property
    def head_size(self) -> int:
        return self.head_dim or self.dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def hidden(self) -> int:
        return self.ffn_dim or -(-8 * self.dim // (3 * 32)) * 32


def block_parameters(model: ModelConfig) -> int:
    """Parameters of one block."""
    query, kv = model.num_heads * model.head_size, model.kv_heads * model.head_size
    biases = (query + 2 * kv) if model.qkv_bias else 0
    head_norms = 2 * model.head_size if model.qk_norm else 0
    return block_matrices(model) + biases + head_norms + 2 * model.dim


def block_matrices(model: ModelConfig) -> int:
    """Parameters of one block that multiply: all but norms and biases."""
    query, kv = model.num_heads * model.head_size, model.kv_heads * model.head_size
    return 2 * model.dim * (query + kv) + 3 * model.dim * model.hidden


def num_parameters(model: ModelConfig) -> int:
    """Parameters of the whole model; a tied matrix counts once."""
    embeddings = model.vocab_size * model.dim * (1 if model.tie_embeddings else 2)
    return model.num_layers * block_parameters(model) + embeddings + model.dim


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations of forward and backward for one token: the numerator of MFU.

    `6 N + 12 L Q s / 2`: six for each parameter that multiplies (the embedding's look-up does not, the output
    projection does), and twelve for each layer, query channel (Q = heads times head dim) and visible key. Causal
    attention sees half of the keys on average, and with a window of w tokens `w - w^2 / 2s` of them; documents packed
    into one sequence see fewer still, which this formula ignores. Recomputed activations are not counted. Source: PaLM,
    appendix B, with the causal half.
    """
    weights = model.num_layers * block_matrices(model) + model.vocab_size * model.dim
    window = min(model.window or sequence_length, sequence_length)
    visible = window * (1 - window / (2 * max(sequence_length, 1)))
    attention = 12 * model.num_layers * model.num_heads * model.head_size * visible
    return 6.0 * weights + attention


def stage_costs(model: ModelConfig, sequence_length: int) -> tuple[float, float, float]:
    """What a layer, the embedding, and the output projection with the loss cost: operations for a token, as
    `flops_per_token` counts them. A look-up and the norms are counted as nothing."""
    head = 6.0 * model.vocab_size * model.dim
    return (flops_per_token(model, sequence_length) - head) / model.num_layers, 0.0, head
