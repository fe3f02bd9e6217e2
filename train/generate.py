"""Text that a model writes, one token after the other."""

from pathlib import Path

import torch

from armillary.train.loaded_run import loaded_run
from armillary.train.model import Transformer
from armillary.train.tokenizer import Tokenizer


@torch.no_grad()
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
        context: how many of the last tokens the model sees, at most the length it was trained on.
    """
    # A prompt from a command line may hold bytes that are no UTF-8.
    prompt = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    generator = torch.Generator().manual_seed(seed)
    written = tokenizer.encode(prompt) or [tokenizer.end_of_document]
    device = next(model.parameters()).device
    model.eval()
    for _ in range(num_tokens):
        window = torch.tensor([written[-context:]], device=device)
        logits = model(window)[0, -1, : tokenizer.vocab_size].float().cpu()
        if not logits.isfinite().all():
            raise ValueError("the model's weights are not finite, so it cannot write; take an earlier checkpoint")
        token = int(logits.argmax())
        if temperature > 0:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        if token == tokenizer.end_of_document:
            break
        written.append(token)
    return tokenizer.decode(written)


def generate_from_run(run: str | Path, prompt: str, num_tokens: int, temperature: float = 0.8, seed: int = 0) -> str:
    """`generate` with a run's newest sound checkpoint.

    Raises:
        ValueError: if there is no such run or it has no sound checkpoint.
    """
    with loaded_run(run) as loaded:
        context = loaded.config.data.sequence_length
        return generate(loaded.model, loaded.tokenizer, prompt, num_tokens, temperature, seed, context)
