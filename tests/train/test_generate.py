"""Writing with a memory of keys and values: the same logits as without one, whatever the window and the context."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places
from armillary.train.data.tokenizer import byte_tokenizer
from armillary.train.generate import generate, shown
from armillary.train.model.kv_cache import RememberingCore, remembering
from armillary.train.model.shape import ModelConfig, RopeScaling
from armillary.train.model.transformer import Transformer

VOCAB = 260
TINY: dict[str, Any] = {"dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 48, "vocab_size": VOCAB}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_kv_heads": 1},
    "window": {"num_kv_heads": 2, "window": 5},
    "window of one": {"window": 1},
    "qwen3": {"qk_norm": True, "head_dim": 20, "tie_embeddings": False},
    "llama3": {"rope_scaling": RopeScaling(original_length=16)},
}


def build(**changes: Any) -> Transformer:
    """A float64 model with random weights that make its logits large enough to differ."""
    model = Transformer(ModelConfig(**(TINY | changes))).to(torch.float64)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def tokens(length: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("shape", list(SHAPES))
@settings(max_examples=8, deadline=None)
@given(steps=st.lists(st.integers(1, 9), min_size=1, max_size=12), rows=st.integers(1, 2))
def test_logits_are_those_without_a_memory(shape: str, steps: list[int], rows: int) -> None:
    model, text = build(**SHAPES[shape]), tokens(sum(steps), rows)
    with torch.no_grad():
        whole = model(text)
    with remembering(model) as memory:
        parts = [memory.read(part) for part in text.split(steps, dim=1)]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-9
    with torch.no_grad():
        assert torch.equal(model(text), whole), "the model is the ordinary one again"


def test_last_token_alone() -> None:
    model, text = build(), tokens(7)
    with remembering(model, last_only=True) as memory, torch.no_grad():
        last = memory.read(text)
    assert last.shape == (1, 1, VOCAB)
    assert (last[:, 0] - model(text)[:, -1]).abs().max() < 1e-9


def test_forgetting_begins_anew() -> None:
    model = build()
    with remembering(model) as memory:
        first = memory.read(tokens(6))
        memory.read(tokens(3))
        memory.forget()
        assert torch.equal(memory.read(tokens(6)), first)


def test_a_window_bounds_what_is_kept() -> None:
    core, most = RememberingCore(Mask(window=8)), 0
    for position in range(100):
        one = torch.zeros(1, 1, 2, 4)
        core(one, one, one, Places.in_order(1, 1, start=position))
        assert core.past is not None
        most = max(most, core.past.shape[2])
    assert most <= 16


def test_how_much_of_a_text_is_shown() -> None:
    assert [shown(length, 6) for length in range(1, 16)] == [1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 3, 4, 5, 6, 3]
    assert [shown(length, 1) for length in range(1, 4)] == [1, 1, 1]
    assert all(context // 2 <= shown(length, context) <= context for context in range(2, 9) for length in range(9, 60))


@pytest.mark.parametrize("context", [1, 7, 1000])
@pytest.mark.parametrize("shape", ["plain", "window"])
def test_text_is_that_of_the_plain_loop(shape: str, context: int) -> None:
    """Greedy and drawn, beyond the context, against a loop that shows the whole model every token again."""
    model, tokenizer, prompt = build(**SHAPES[shape]), byte_tokenizer(), "der Himmel über der"
    for temperature in (0.0, 0.8):
        written, generator = tokenizer.encode(prompt), torch.Generator().manual_seed(3)
        for _ in range(40):
            with torch.no_grad():
                logits = model(torch.tensor([written[-shown(len(written), context) :]]))[0, -1, :257].float()
            token = int(logits.argmax())
            if temperature:
                token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
            if token == tokenizer.end_of_document:
                break
            written.append(token)
        assert generate(model, tokenizer, prompt, 40, temperature, 3, context) == tokenizer.decode(written)


def test_an_empty_prompt_begins_a_document() -> None:
    assert generate(build(), byte_tokenizer(), "", 5, 0.0, 0, 16)


def test_weights_that_are_no_numbers_are_refused() -> None:
    model = build()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        generate(model, byte_tokenizer(), "x", 5, 0.0, 0, 16)
