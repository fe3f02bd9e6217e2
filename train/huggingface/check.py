"""Whether our model and transformers' give the same logits from the same files: the last step of import and export."""

import math
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armillary.train.data.tokenizer import Tokenizer
from armillary.train.failure import RunStopped
from armillary.train.model.shape import ModelConfig
from armillary.train.model.transformer import Transformer

LARGEST_ERROR = 1e-4
"""Of a logit in float32, relative to the largest logit, or absolute where all are below 1."""
TOKENS = 96
TEXT = "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n\nÀ la carte: 12,345 € (naïve)."


class LogitsDiffer(RunStopped):
    """Our model is not the one in the files: the check's figures are in `result`."""

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result


def check_logits(
    result: dict[str, Any],
    consequence: str,
    report: Callable[[str], None],
    config: ModelConfig,
    read: Callable[[str], Tensor],
    tokenizer: Tokenizer,
    folder: Path,
    gguf_file: str | None = None,
) -> None:
    """Puts `logits_error` into the result, if the packages that this takes are installed, and tells of it.

    Args:
        result: of the command.
        consequence: what follows if the error is too large.
        report: takes one line.
        config, read, tokenizer, folder, gguf_file: see `logits_error`.

    Raises:
        LogitsDiffer: if the error is too large.
        RunStopped: if transformers cannot load the files.
    """
    needed = ("transformers", "accelerate") if gguf_file else ("transformers",)
    if missing := " ".join(name for name in needed if find_spec(name) is None):
        report(f"the logits were not checked, since a package is not installed; pip install {missing}")
        return
    error = result["logits_error"] = logits_error(config, read, tokenizer, folder, gguf_file)
    if not error < LARGEST_ERROR:
        raise LogitsDiffer(
            f"a logit differs from transformers' by {error:.3g}, which is more than {LARGEST_ERROR:g}; {consequence}",
            result,
        )
    report(f"logits: the largest difference to transformers is {error:.1e} (allowed: {LARGEST_ERROR:g})")


def logits_error(
    config: ModelConfig, read: Callable[[str], Tensor], tokenizer: Tokenizer, folder: Path, gguf_file: str | None = None
) -> float:
    """The largest difference between two logits over the largest logit (but at least 1), in float32.

    Over a short text and random tokens. One model is in memory at a time.

    Args:
        config: of our model.
        read: a whole parameter by our name.
        tokenizer: of the text; the random tokens are of the whole vocabulary.
        folder: what transformers loads.
        gguf_file: a file in it, for transformers to load.

    Returns:
        The error; infinite where one side has no number.

    Raises:
        RunStopped: if transformers cannot load it.
    """
    tokens = _probe(config, tokenizer)
    ours = _our_logits(config, read, tokens)
    theirs = _their_logits(folder, gguf_file, tokens)
    if ours.shape != theirs.shape:
        raise RunStopped(f"{folder}: transformers gives logits {tuple(theirs.shape)}, our model {tuple(ours.shape)}")
    error = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1))
    return error if math.isfinite(error) else math.inf


def _probe(config: ModelConfig, tokenizer: Tokenizer) -> Tensor:
    """Tokens (1, n): a text, and random ones of the model's whole vocabulary; more than a small window."""
    text = tokenizer.encode(TEXT)[:TOKENS]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, config.vocab_size, (2 * TOKENS - len(text),), generator=generator)
    return torch.cat([torch.tensor(text, dtype=torch.int64), drawn])[None]


@torch.no_grad()
def _their_logits(folder: Path, gguf_file: str | None, tokens: Tensor) -> Tensor:
    import transformers

    noise = transformers.utils.logging
    before = noise.get_verbosity()
    noise.set_verbosity_error()
    noise.disable_progress_bar()
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {"use_safetensors": True}
    try:
        with redirect_stderr(StringIO()):  # other progress bars
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, **options
            )
            return model.eval()(tokens, use_cache=False).logits
    except Exception as error:
        raise RunStopped(f"{folder}: transformers {transformers.__version__} cannot load it: {error}") from error
    finally:
        noise.set_verbosity(before)
        noise.enable_progress_bar()


@torch.no_grad()
def _our_logits(config: ModelConfig, read: Callable[[str], Tensor], tokens: Tensor) -> Tensor:
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        parameter.copy_(read(name))
    return model(tokens)
