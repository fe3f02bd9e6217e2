"""Text that a model writes, one token after the other."""

from pathlib import Path

import torch
from torch import Tensor

from armillary.train.data.tokenizer import Tokenizer
from armillary.train.loaded_run import loaded_run
from armillary.train.model.kv_cache import Memory, remembering
from armillary.train.model.transformer import Transformer


def generate(
    model: Transformer, tokenizer: Tokenizer, prompt: str, num_tokens: int, temperature: float, seed: int, context: int
) -> str:
    """The prompt and its continuation, up to `num_tokens` tokens or the end of the document.

    Args:
        model: whole, on one process.
        tokenizer: of the run.
        prompt: text to continue; an empty one begins a document.
        num_tokens: most tokens to write.
        temperature: 0 takes the likeliest token; 1 draws from the model's own distribution.
        seed: of the draws; the same seed writes the same text.
        context: how many tokens the model sees at most: the length it was trained on. See `shown`.

    Raises:
        ValueError: if the model's weights are not finite.
    """
    # A prompt from a command line may hold bytes that are no UTF-8.
    prompt = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    generator = torch.Generator().manual_seed(seed)
    written = tokenizer.encode(prompt) or [tokenizer.end_of_document]
    model.eval()
    with remembering(model, last_only=True) as memory:
        for _ in range(num_tokens):
            logits = _next(memory, written, context, next(model.parameters()).device)[: tokenizer.vocab_size]
            if not logits.isfinite().all():
                raise ValueError("the model's weights are not finite, so it cannot write; take an earlier checkpoint")
            token = int(logits.argmax())
            if temperature > 0:
                token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
            if token == tokenizer.end_of_document:
                break
            written.append(token)
    return tokenizer.decode(written)


def shown(length: int, context: int) -> int:
    """How many of the last tokens a model sees of a text of `length` tokens: never more than `context`.

    It sees all, until the context is full; then the older half is left out, and what remains is read again from
    position 0, as any text in training was. So no position and no distance comes up that was not trained, and reading
    again costs, spread over the tokens written, about as much as one more token each.
    """
    if length <= context:
        return length
    kept = max(1, context // 2)
    return kept + (length - context - 1) % (context - kept + 1)


def _next(memory: Memory, written: list[int], context: int, device: torch.device) -> Tensor:
    """Logits (vocab,) of the token after those written, float32 on the CPU; reads what the memory does not hold."""
    seen = shown(len(written), context)
    new = seen - memory.length
    if new < 1:
        memory.forget()
        new = seen
    return memory.read(torch.tensor([written[-new:]], device=device))[0, -1].float().cpu()


def generate_from_run(run: str | Path, prompt: str, num_tokens: int, temperature: float = 0.8, seed: int = 0) -> str:
    """`generate` with a run's newest sound checkpoint.

    Raises:
        ValueError: if there is no such run or it has no sound checkpoint.
    """
    with loaded_run(run) as loaded:
        context = loaded.config.data.sequence_length
        return generate(loaded.model, loaded.tokenizer, prompt, num_tokens, temperature, seed, context)
