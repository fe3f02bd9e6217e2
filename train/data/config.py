"""What a run reads: the keys of `[data]`. Imports no torch."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from armillary.train.data.sources import Source

SMALLEST_BPE = 257
"""Bytes and the end of a document."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads."""

    __pydantic_config__ = {"extra": "forbid"}

    sequence_length: int = field(default=256, metadata={"min": 2})
    """Tokens in a sequence."""
    batch_size: int = field(default=16, metadata={"min": 1})
    """Sequences in a step, on all ranks together."""
    sources: tuple[Source, ...] = (Source(path="stdlib"),)
    """Where the text comes from."""
    tokenizer: str = "bpe:4096"
    """`bpe:4096` (a byte-level encoding of so many entries, learnt from the sources), `bytes`, a tokenizer.json or a
    folder that holds one."""
    held_out: float = field(default=0.02, metadata={"min": 0, "below": 1})
    """Fraction of the documents that is kept from training, for evaluation; chosen by their text."""
    seed: int = field(default=0, metadata={"min": 0})
    """Seed of the order of the documents; it does not change which are held out."""
    cache: str = ""
    """Folder for tokens and tokenizers; `$ARMILLARY_CACHE` or the user's cache folder when left out."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """What the fields do not allow: pairs of key and sentence."""
        if not self.sources:
            yield "sources", 'is empty; give at least one, such as [{path = "stdlib"}]'
        kind, _, size = self.tokenizer.partition(":")
        if kind == "bpe" and not (size.isascii() and size.isdigit() and len(size) < 8 and int(size) >= SMALLEST_BPE):
            what = f"a vocabulary of {SMALLEST_BPE} (the bytes and the end of a document) to 9999999"
            yield "tokenizer", f'is "{self.tokenizer}"; bpe: takes {what}, such as "bpe:4096"'
        elif not self.tokenizer:
            yield "tokenizer", 'is empty; give "bpe:4096", "bytes" or the path of a tokenizer.json'


def from_anywhere(config: DataConfig) -> DataConfig:
    """The config with its relative paths made absolute, so that it means the same in every working directory."""
    sources = tuple(
        source
        if source.path == "stdlib" or source.path.startswith("hub:")
        else replace(source, path=os.path.abspath(os.path.expanduser(source.path)))
        for source in config.sources
    )
    made_here = config.tokenizer == "bytes" or config.tokenizer.startswith("bpe:")
    tokenizer = config.tokenizer if made_here else os.path.abspath(os.path.expanduser(config.tokenizer))
    cache = os.path.abspath(os.path.expanduser(config.cache)) if config.cache else ""
    return replace(config, sources=sources, tokenizer=tokenizer, cache=cache)
