"""A model in llama.cpp's GGUF file: its metadata as a `config.json`, its tensors as Hugging Face has them.

The package `gguf`, of llama.cpp's makers, reads the container and undoes the quantisation.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from armillary.train.huggingface.gguf_tokenizer import read_tokenizer
from armillary.train.huggingface.source import Source

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Of GGUF files; llama.cpp calls SmolLM2 and Mistral llama too."""
KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
"""After the name of the architecture; and the keys of `config.json`."""
HARMLESS = ("attention.value_length", "rope.dimension_count", "rope.scaling.type")
"""Looked at below, or the same as another key."""
PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def open_gguf(path: Path) -> Source:
    """See `open_source`.

    Raises:
        ValueError: if the package `gguf` is missing, or the file is damaged or of another architecture.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError(f'{path}: GGUF files are read by the package gguf; pip install "armillary[hf]"') from None
    try:
        reader = gguf.GGUFReader(path)
        tensors = {_their_name(tensor.name): tensor for tensor in reader.tensors}
    except Exception as error:  # whatever the library stumbles over in a damaged file
        raise ValueError(f"{path}: cannot be read as a GGUF file ({error}); fetch it again") from error
    where = str(path)

    def fact(name: str) -> Any:
        """A value of the metadata, or None. Long lists are made only here."""
        return reader.fields[name].contents() if name in reader.fields else None

    config = _config(fact, reader.fields, where, tied="lm_head.weight" not in tensors)

    def read(name: str) -> Tensor:
        stored = tensors[name]
        array = gguf.dequantize(stored.data, stored.tensor_type).astype(np.float32, copy=False)
        tensor = torch.from_numpy(np.array(array)).reshape(_shape(stored))
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config.get("num_key_value_heads")}
        part = name.split(".")[-2]
        if config["model_type"] == "llama" and part in heads:
            return _halves(tensor, heads[part] or config["num_attention_heads"])
        return tensor

    return Source(
        where=where,
        config=config,
        shapes={name: _shape(tensor) for name, tensor in tensors.items()},
        read=read,
        tokenizer=lambda: read_tokenizer(path, fact),
        folder=path.parent,
        gguf_file=path.name,
    )


def _shape(tensor: Any) -> tuple[int, ...]:
    """llama.cpp counts dims from the innermost out."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _their_name(name: str) -> str:
    """Hugging Face's name; one that has none stays as it is, and is refused later, as a tensor too many."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in PARTS:
        return f"model.layers.{parts[1]}.{PARTS[parts[2]]}.{parts[3]}"
    return f"{ENDS[parts[0]]}.{parts[1]}" if len(parts) == 2 and parts[0] in ENDS else name


def _halves(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a projection back in Hugging Face's order: llama.cpp keeps the two of each rotated pair side by side,
    for the llama architecture alone; Hugging Face has all first ones of a head, then all second ones."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)


def _config(fact: Callable[[str], Any], names: Iterable[str], where: str, tied: bool) -> dict[str, Any]:
    """As a `config.json` would say it; see `families.read_config` for what is checked there."""
    kind = fact("general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{where}: general.architecture is {kind!r}; GGUF files of {', '.join(ARCHITECTURES)} can be imported"
        )
    own = {name.removeprefix(f"{kind}."): fact(name) for name in names if name.startswith(f"{kind}.")}
    for name, value in own.items():
        if name not in KEYS and name not in HARMLESS and value not in (0, False, ""):
            raise ValueError(
                f"{where}: {kind}.{name} is {value!r}, which our models do not have; take the model as a folder "
                "of safetensors, where it may be one that they have"
            )
    scaling = own.get("rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"{where}: {kind}.rope.scaling.type is {scaling!r}; take the model as a folder of safetensors")
    config = {theirs: own[name] for name, theirs in KEYS.items() if name in own}
    config |= {"model_type": kind, "tie_word_embeddings": tied, "use_sliding_window": "sliding_window" in config}
    if kind == "llama" and config.get("sliding_window"):
        config["model_type"] = "mistral"
    if "vocab_size" not in config and (tokens := fact("tokenizer.ggml.tokens")):
        config["vocab_size"] = len(tokens)
    head = config.get("head_dim") or config.get("hidden_size", 0) // max(config.get("num_attention_heads", 1), 1)
    turned = own.get("rope.dimension_count", head)
    if turned != head:
        raise ValueError(
            f"{where}: {kind}.rope.dimension_count is {turned}; our models turn whole heads, which is {head}"
        )
    if "rms_norm_eps" in config:
        # Stored in 32 bits: 1e-5 reads 9.999999747378752e-06.
        config["rms_norm_eps"] = float(np.format_float_positional(np.float32(config["rms_norm_eps"])))
    return config
