"""Text to token numbers and back, and how many bytes each token stands for. Imports no torch.

All three kinds (bytes, a byte-pair encoding trained here, a `tokenizer.json` of the user's) are one class around one
library, `tokenizers`, so that any of them can be saved beside a checkpoint and read by other tools.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from armillary.train.files import write_aside, write_json

if TYPE_CHECKING:
    import tokenizers

END = "<|end|>"
"""Literal of the end-of-document token of the tokenizers made here."""

SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where text is cut before merging: GPT-4's pattern, which keeps a line's indentation in one piece, but with numbers in
pairs of digits (a small vocabulary has no room for a thousand triples)."""

ENDS = (END, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>")
"""What a tokenizer file without a `tokenizer_config.json` may call its end-of-document token, likeliest first."""


class Tokenizer:
    """A vocabulary with an end-of-document token.

    Text never turns into a special token, whatever it spells; only `end_of_document` itself, appended by the caller,
    stands for one.
    """

    def __init__(self, inner: "tokenizers.Tokenizer", end: str) -> None:
        """Wraps a tokenizer of the library, whose truncation and padding are turned off; `end` is in its vocabulary."""
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self._inner = inner
        self._end = end
        self.end_of_document: int = vocabulary[end]
        """Number of the token that ends a document."""
        self.vocab_size: int = max(vocabulary.values()) + 1
        """One more than the highest token number: the rows that an embedding needs."""
        self.byte_lengths: np.ndarray = _byte_lengths(json.loads(inner.to_str()), vocabulary, self.vocab_size)
        """(vocab_size,) int64: UTF-8 bytes of text that each token stands for; 0 for special tokens."""
        self.hash: str = hashlib.blake2b(f"{end} {inner.to_str()}".encode(), digest_size=16).hexdigest()
        """Changes when the tokenizer does."""

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text, without an end-of-document token."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` for several texts, on all cores."""
        return [encoding.ids for encoding in self._inner.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token numbers; special tokens have none, and bytes that are not UTF-8 become U+FFFD."""
        return self._inner.decode([int(i) for i in ids])

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json` into a folder, as `transformers` and `load_tokenizer`
        read them."""
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._end}
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_aside(Path(folder) / "tokenizer.json", self._inner.to_str().encode())
        write_json(Path(folder) / "tokenizer_config.json", settings)


def byte_tokenizer() -> Tokenizer:
    """The 256 bytes, numbered by value, and the end-of-document token 256."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers

    inner = Inner(models.BPE(vocab={letter: byte for byte, letter in enumerate(_letters())}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END])
    return Tokenizer(inner, END)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level byte-pair encoding learnt from texts; the same texts in the same order give the same tokenizer.

    Has `vocab_size` entries (end of document, 256 bytes, merges), or fewer where no pair occurs twice any more.
    Source: Sennrich et al. 2016 (arXiv 1508.07909), on bytes as in GPT-2.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Inner

    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner, END)


def load_tokenizer(path: str | Path, key: str = "data.tokenizer") -> Tokenizer:
    """Opens a `tokenizer.json`, or the folder that holds one.

    The end-of-document token is `eos_token` of the `tokenizer_config.json` beside it, or else the first of the usual
    names that is in the vocabulary.

    Args:
        key: the config key that errors name.

    Raises:
        ValueError: if there is no such file, it is not a tokenizer, or it has no end-of-document token.
    """
    from tokenizers import Tokenizer as Inner

    where = f'{key} = "{path}"'
    file = Path(os.path.expanduser(path))
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(
            f'{where}: there is no file {file}; give "bpe:4096", "bytes", a tokenizer.json or a folder that holds one'
        )
    try:
        inner = Inner.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{where}: {file} is not a tokenizer file ({reason}); give a tokenizer.json that the library `tokenizers` "
            "can read"
        ) from None
    vocabulary = inner.get_vocab(with_added_tokens=True)
    end = next((name for name in _end_names(file.parent / "tokenizer_config.json", where) if name in vocabulary), None)
    if end is None:
        raise ValueError(
            f"{where}: no token that ends a document (tried {', '.join(ENDS)}); "
            f'put a tokenizer_config.json with "eos_token" beside {file}'
        )
    return Tokenizer(inner, end)


def _end_names(config: Path, where: str) -> Iterator[str]:
    if config.is_file():
        try:
            name = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{where}: {config} is not a JSON object ({error}); mend it or remove it") from None
        name = name.get("content") if isinstance(name, dict) else name
        if isinstance(name, str):
            yield name
    yield from ENDS


def _byte_lengths(description: dict[str, Any], vocabulary: dict[str, int], vocab_size: int) -> np.ndarray:
    """UTF-8 bytes of each token, from a tokenizer's JSON description.

    Three spellings are known: a letter for each byte (GPT-2), "\u2581" for a space with "<0x0A>" for a byte
    (SentencePiece), and plain text with "##" for "goes on" (WordPiece; it forgets spaces, so its lengths are a lower
    bound).
    """
    added = {token["id"]: token for token in description["added_tokens"]}
    unknown = description["model"].get("unk_token")
    kinds = set(_types([description["pre_tokenizer"], description["decoder"]]))
    byte_level = "ByteLevel" in kinds
    byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)} if description["model"].get("byte_fallback") else set()
    lengths = np.zeros(vocab_size, dtype=np.int64)
    for token, number in vocabulary.items():
        if number in added:
            lengths[number] = 0 if added[number]["special"] else len(token.encode())
        elif token == unknown:
            lengths[number] = 0
        elif byte_level:
            lengths[number] = len(token)
        elif token in byte_tokens:
            lengths[number] = 1
        else:
            lengths[number] = len(token.replace("\u2581", " ").removeprefix("##").encode())
    return lengths


def _types(part: Any) -> Iterator[str]:
    """Every `type` in a nested JSON description."""
    if isinstance(part, dict):
        if isinstance(part.get("type"), str):
            yield part["type"]
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            yield from _types(inner)


def _letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies: itself where it prints, else U+0100 and up.

    Source: `bytes_to_unicode` of GPT-2's encoder.
    """
    printing = {*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]
