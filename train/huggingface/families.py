"""Hugging Face's words for our models: `config.json` and the names of tensors, both ways. Imports no torch.

A key that could change what a model computes, and that ours do not have, is refused: never passed over in silence.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from armillary.train.model.shape import ModelConfig, RopeScaling


@dataclass(frozen=True)
class Family:
    """What a `model_type` stands for."""

    architecture: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of our config that the family decides."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes for a key that is left out."""


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", defaults={"sliding_window": 4096, "num_key_value_heads": 8}),
    "qwen2": Family("Qwen2ForCausalLM", {"qkv_bias": True}, {"num_key_value_heads": 32}),
    "qwen3": Family("Qwen3ForCausalLM", {"qk_norm": True}, {"num_key_value_heads": 32, "head_dim": 128}),
}
"""By `model_type`. SmolLM2 is of the type llama."""

SIZES = {
    "hidden_size": "dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_dim",
    "vocab_size": "vocab_size",
}
"""Whole numbers that every config.json has, and our names for them."""
WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
OTHER_KEYS = ("model_type", "rms_norm_eps", "num_key_value_heads", "head_dim", "tie_word_embeddings", "rope_theta")
ROPE_KEYS = ("rope_scaling", "rope_parameters", "max_position_embeddings")
MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
}
"""Keys with the only values that our models compute."""
HARMLESS = (
    *("architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "initializer_range", "attention_dropout"),
    *("pretraining_tp", "is_llama_config", "transformers.js_config", "_attn_implementation", "return_dict"),
    *("chunk_size_feed_forward", "id2label", "label2id", "max_length", "num_return_sequences", "tokenizer_class"),
    *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "num_beams"),
    *("num_beam_groups", "diversity_penalty", "problem_type", "task_specific_params", "tf_legacy_loss"),
)
"""Keys that say nothing about what the model computes outside training."""
LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "original_max_position_embeddings": "original_length",
}
"""Keys of `rope_scaling`, and the fields of our RopeScaling."""


def read_config(values: Mapping[str, Any], where: str) -> ModelConfig:
    """Our config of a model that a `config.json` describes.

    Raises:
        ValueError: if it is of no family that we know, or asks for what our models do not compute; names the key.
    """

    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{where}: model_type is {kind!r}; models of {', '.join(FAMILIES)} can be imported")
    family = FAMILIES[kind]
    values = {**family.defaults, **values}
    for key, sentence in _refused(values):
        raise ValueError(f"{where}: {key} {sentence}")
    head_dim = values.get("head_dim")
    config = ModelConfig(
        **{ours: values[theirs] for theirs, ours in SIZES.items()},
        **family.fixed,
        num_kv_heads=values.get("num_key_value_heads"),
        head_dim=None if head_dim == values["hidden_size"] / values["num_attention_heads"] else head_dim,
        norm_eps=values["rms_norm_eps"],
        tie_embeddings=values.get("tie_word_embeddings", False),
        window=_read_window(values, kind, where),
        **_read_rope(values, where),
    )
    for key, sentence in config.problems():
        raise ValueError(f"{where}: the model it describes is not one of ours: model.{key} {sentence}")
    return config


def _refused(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys that cannot be taken as they are, each with a sentence."""
    known = {*SIZES, *WINDOW_KEYS, *OTHER_KEYS, *ROPE_KEYS, *HARMLESS}
    for key, value in values.items():
        if key in MUST_BE and value not in MUST_BE[key]:
            yield key, f"is {value!r}; only {MUST_BE[key][-1]!r} can be imported"
        elif key not in known and key not in MUST_BE and value not in (None, False, 0, "", [], {}):
            yield key, f"is {value!r}, which our models do not have; if it changes nothing in the result, remove it"
    for key in ("max_position_embeddings", *SIZES):
        if type(values.get(key)) is not int or values[key] < 1:
            yield key, f"must be a whole number above 0; it is {values.get(key)!r}"
    for key in ("num_key_value_heads", "head_dim"):
        if values.get(key) is not None and (type(values[key]) is not int or values[key] < 1):
            yield key, f"must be a whole number above 0, or left out; it is {values[key]!r}"
    eps = values.get("rms_norm_eps")
    if type(eps) is not float or not 0 < eps < 1:
        yield "rms_norm_eps", f"must be a number between 0 and 1; it is {eps!r}"
    tied = values.get("tie_word_embeddings", False)
    if type(tied) is not bool:
        yield "tie_word_embeddings", f"must be true or false; it is {tied!r}"


def _read_window(values: Mapping[str, Any], kind: str, where: str) -> int | None:
    """Tokens that a query sees, itself included, which is how both sides count; None for all."""
    window = values.get("sliding_window")
    if kind == "llama" or window is None or (kind != "mistral" and not values.get("use_sliding_window", False)):
        return None  # transformers looks at it in no other case
    if type(window) is not int or window < 1:
        raise ValueError(f"{where}: sliding_window must be a whole number above 0, or null; it is {window!r}")
    if kind == "mistral":
        return window
    full, layers = values.get("max_window_layers", 28), values["num_hidden_layers"]
    slides = [layer >= full for layer in range(layers)]
    if values.get("layer_types") is not None:
        slides = [name == "sliding_attention" for name in values["layer_types"]]
    if any(slides) and not all(slides):
        raise ValueError(
            f"{where}: use_sliding_window holds for {sum(slides)} of {layers} layers (layer_types, max_window_layers); "
            "our models have one window for all layers, or none"
        )
    return window if any(slides) else None


def _read_rope(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Our fields of the rotary embedding: transformers 5 writes `rope_parameters`, older ones the other two keys."""
    rope = {"rope_theta": values.get("rope_theta", 10_000.0), **(values.get("rope_scaling") or {})}
    rope |= values.get("rope_parameters") or {}
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    theta, part = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", 1.0)
    if part != 1.0:
        raise ValueError(f"{where}: partial_rotary_factor is {part!r}; our models turn whole heads, which is 1.0")
    if kind not in ("default", "llama3"):
        raise ValueError(f"{where}: rope_scaling is of the type {kind!r}; only 'llama3' and 'default' can be imported")
    if not isinstance(theta, (int, float)) or theta <= 0:
        raise ValueError(f"{where}: rope_theta must be a number above 0; it is {theta!r}")
    if kind == "default":
        return {"rope_theta": float(theta)}
    rope.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    for key in LLAMA3:
        if not isinstance(rope.get(key), (int, float)) or rope[key] <= 0:
            raise ValueError(f"{where}: rope_scaling.{key} must be a number above 0; it is {rope.get(key)!r}")
    unknown = sorted(set(rope) - set(LLAMA3))
    if unknown:
        raise ValueError(f"{where}: rope_scaling.{unknown[0]} is not known to the type llama3; remove it")
    scaling = {ours: float(rope[theirs]) for theirs, ours in LLAMA3.items() if ours != "original_length"}
    length = int(rope["original_max_position_embeddings"])
    return {"rope_theta": float(theta), "rope_scaling": RopeScaling(**scaling, original_length=length)}


def family_of(config: ModelConfig) -> str:
    """The `model_type` that computes what our config says.

    Raises:
        ValueError: if there is none.
    """
    if config.qk_norm and config.qkv_bias:
        raise ValueError(
            "model.qk_norm and model.qkv_bias: no family of Hugging Face has both, so this run cannot be exported"
        )
    if config.qk_norm or config.qkv_bias:
        return "qwen3" if config.qk_norm else "qwen2"
    # transformers refuses a llama whose heads do not divide its width, though it computes it.
    return "mistral" if config.window or config.dim % config.num_heads else "llama"


def write_config(config: ModelConfig, context: int, end_of_document: int, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model of ours, in keys that old and new transformers read.

    Args:
        context: tokens of the longest sequence that it was trained on.
        end_of_document: number of that token.
        dtype: of the tensors, "float32" or "bfloat16".
    """
    kind = family_of(config)
    scaling = config.rope_scaling
    values: dict[str, Any] = {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
        "intermediate_size": config.hidden,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": context,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": end_of_document,
        "pad_token_id": None,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if scaling is not None:
        values["rope_scaling"] = {
            "rope_type": "llama3",
            **{theirs: getattr(scaling, ours) for theirs, ours in LLAMA3.items()},
        }
    if kind == "mistral":
        values["sliding_window"] = config.window
    elif kind in ("qwen2", "qwen3"):
        window = {"sliding_window": config.window, "use_sliding_window": config.window is not None}
        values |= {**window, "max_window_layers": 0 if config.window else config.num_layers}
    return values


PARTS = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}
"""Of a block: our name and Hugging Face's."""
ENDS = {"embedding": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
"""Of the whole model."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def their_name(name: str) -> str:
    """Hugging Face's name of a parameter of ours."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if match:
        return f"model.layers.{match[1]}.{PARTS[match[2]]}.{match[3]}"
    part, _, kind = name.partition(".")
    return f"{ENDS[part]}.{kind}"
