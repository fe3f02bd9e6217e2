"""Where a model is imported from: one interface over a folder of safetensors and a GGUF file.

Nothing is unpickled, nothing downloaded, no code of the folder run. Tensors are read one at a time.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armillary.train.data.tokenizer import Tokenizer, load_tokenizer
from armillary.train.files import safe_join
from armillary.train.words import few

READABLE = ("F32", "BF16", "F16")
"""Dtypes of tensors that are weights as they stand; others are quantised, with scales beside them."""
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Source:
    """A model as others wrote it."""

    where: str
    """The file that its config stands in, for messages."""
    config: Mapping[str, Any]
    """As in a `config.json`."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of every tensor, by Hugging Face's names."""
    read: Callable[[str], Tensor]
    """A whole tensor, float32, in memory of its own."""
    tokenizer: Callable[[], Tokenizer]
    folder: Path
    gguf_file: str | None = None
    """Name of the file in the folder, for transformers."""


def open_source(path: Path, files: ExitStack) -> Source:
    """Opens a folder with `config.json`, `*.safetensors` and `tokenizer.json`, or a GGUF file.

    Args:
        files: keeps the files open, until it is closed.

    Raises:
        ValueError: if it is neither, or what is in it cannot be used.
    """
    if path.is_dir():
        return _open_folder(path, files)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such folder or file; give a folder with config.json, or a GGUF file")
    if path.suffix.lower() != ".gguf":
        raise ValueError(f"{path}: is no GGUF file; give one, or the folder that holds config.json and *.safetensors")
    from armillary.train.huggingface.gguf import open_gguf

    return open_gguf(path)


def _open_folder(path: Path, files: ExitStack) -> Source:
    from safetensors import SafetensorError, safe_open

    config = _read_json(path / "config.json", "give a folder of Hugging Face's kind")
    held: dict[str, Any] = {}
    shapes = {}
    for name in _tensor_files(path):
        file = safe_join(path, name)
        try:
            opened = files.enter_context(safe_open(file, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read ({error}); fetch it again") from error
        for tensor in opened.keys():  # noqa: SIM118 (no mapping)
            entry = opened.get_slice(tensor)
            if tensor in held:
                raise ValueError(f"{file}: holds {tensor!r}, which another file of the folder holds too")
            if entry.get_dtype() not in READABLE:
                raise ValueError(
                    f"{file}: {tensor!r} is {entry.get_dtype()}; {', '.join(READABLE)} can be imported, so take the "
                    "weights before they were quantised"
                )
            held[tensor], shapes[tensor] = opened, tuple(entry.get_shape())
    return Source(
        where=str(path / "config.json"),
        config=config,
        shapes=shapes,
        read=lambda name: held[name].get_tensor(name).to(torch.float32, copy=True),
        tokenizer=lambda: load_tokenizer(path, "import-hf PATH"),
        folder=path,
    )


def _tensor_files(path: Path) -> list[str]:
    """Names of the files that hold the tensors."""
    if (path / INDEX).is_file():
        weight_map = _read_json(path / INDEX, "fetch it again").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{path / INDEX}: has no weight_map from tensors to files; fetch it again")
        names = sorted(set(weight_map.values()))
    else:
        names = sorted(file.name for file in path.glob("*.safetensors"))
    missing = [name for name in names if not safe_join(path, name).is_file()]
    if missing:
        raise ValueError(f"{path / INDEX}: names {few(missing)}, which the folder does not hold; fetch what is missing")
    if names:
        return names
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    if pickled:
        raise ValueError(
            f"{path / pickled[0]}: is a pickle, which may run code when it is read, so it is never opened; get the "
            "model as *.safetensors"
        )
    raise ValueError(f"{path}: holds no *.safetensors; give a folder that has them beside config.json")


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file; {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not a JSON file ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: is no JSON object; {remedy}")
    return value
