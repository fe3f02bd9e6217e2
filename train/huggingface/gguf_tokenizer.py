"""The tokenizer of a GGUF file, rebuilt from its metadata."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from armillary.train.data.tokenizer import Tokenizer, load_tokenizer

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLITS = {
    "gpt-2": (GPT2_SPLIT,),
    "smollm": (r"\p{N}", GPT2_SPLIT),
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    ),
}
"""How text is cut before merging, by the names of `tokenizer.ggml.pre`: first by the one pattern, then by the other.
Source: llama.cpp's `llama-vocab.cpp`."""
CONTROL, USER_DEFINED = 3, 4
"""Kinds of tokens that text is not merged into."""


def read_tokenizer(path: Path, fact: Callable[[str], Any]) -> Tokenizer:
    """The tokenizer in the file, or the `tokenizer.json` beside it, which says more.

    Args:
        fact: a value of the metadata by its name; None for one that is not there.

    Raises:
        ValueError: if there is none beside it, and none in it that can be rebuilt.
    """
    if (path.parent / "tokenizer.json").is_file():
        return load_tokenizer(path.parent, "import-hf PATH")
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Inner

    kind, split = fact("tokenizer.ggml.model"), fact("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in SPLITS:
        raise ValueError(
            f"{path}: tokenizer.ggml.model is {kind!r} and tokenizer.ggml.pre {split!r}; rebuilt can be 'gpt2' with "
            f"{', '.join(SPLITS)}. Put the model's tokenizer.json beside the file"
        )
    tokens, kinds, merges, end = (
        fact(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges", "eos_token_id")
    )
    if tokens is None or merges is None or end is None or not 0 <= end < len(tokens):
        raise ValueError(
            f"{path}: tokenizer.ggml.tokens, merges or eos_token_id is missing; put its tokenizer.json beside it"
        )
    inner = Inner(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            ignore_merges=split == "llama-bpe",
        )
    )
    if split == "qwen2":
        inner.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in SPLITS[split]]
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    kinds = {**dict(enumerate(kinds or [])), end: CONTROL}
    inner.add_special_tokens([AddedToken(tokens[n], special=True) for n, kind in kinds.items() if kind == CONTROL])
    inner.add_tokens([AddedToken(tokens[n], normalized=False) for n, kind in kinds.items() if kind == USER_DEFINED])
    return Tokenizer(inner, tokens[end])
