"""What a model's shape says about it, against the model itself and against published counts."""

import tomllib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from armillary.kernels.attention.call import CAUSAL
from armillary.kernels.attention.places import Places
from armillary.kernels.attention.reference import reference
from armillary.kernels.attention.tiles import Tile
from armillary.train.model.shape import ModelConfig, RopeScaling, flops_per_token, num_parameters
from armillary.train.model.transformer import Transformer, initialise

PRESETS = sorted((Path(__file__).parents[3] / "configs" / "models").glob("*.toml"))
PUBLISHED = {
    "llama3-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
}


def preset(path: Path) -> ModelConfig:
    table = tomllib.loads(path.read_text())
    assert list(table) == ["model"]
    scaling = table["model"].pop("rope_scaling", None)
    return ModelConfig(**table["model"], rope_scaling=None if scaling is None else RopeScaling(**scaling))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_have_the_parameters_they_say(path: Path) -> None:
    config = preset(path)
    assert list(config.problems()) == []
    with torch.device("meta"):
        model = Transformer(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters(config) == count == PUBLISHED.get(path.stem, count)
    assert f"{count:,} parameters" in path.read_text() or path.stem.startswith("tiny-")


def test_every_published_preset_is_there() -> None:
    assert set(PUBLISHED) <= {path.stem for path in PRESETS}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_parameters_with_every_option(bias: bool, norm: bool, tie: bool) -> None:
    config = ModelConfig(
        dim=24, num_heads=6, num_kv_heads=2, head_dim=10, vocab_size=50, qkv_bias=bias, qk_norm=norm, tie_embeddings=tie
    )
    assert num_parameters(config) == sum(p.numel() for p in Transformer(config).parameters())


def test_left_out_values_follow_from_the_others() -> None:
    config = ModelConfig(dim=256, num_heads=8)
    assert (config.head_size, config.kv_heads, config.hidden) == (32, 8, 704)
    assert ModelConfig(dim=96, num_heads=8).hidden == 256


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (ModelConfig(dim=100, num_heads=8), "num_heads"),
        (ModelConfig(dim=24, num_heads=8), "head_dim"),
        (ModelConfig(num_heads=8, head_dim=7), "head_dim"),
        (ModelConfig(num_heads=8, num_kv_heads=3), "num_kv_heads"),
        (RopeScaling(low_frequency_factor=4.0), "high_frequency_factor"),
    ],
)
def test_problems_name_the_key(config: ModelConfig | RopeScaling, key: str) -> None:
    assert [name for name, _ in config.problems()] == [key]


class WrittenOut(nn.Module):
    """Attention in plain matrix products over all pairs, which the counter sees."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
        return reference(q, k, v, Tile(places, places, CAUSAL, q.shape[-1] ** -0.5))[0].to(q.dtype)


@pytest.mark.parametrize("tie", [False, True])
def test_operations_are_those_that_run(tie: bool) -> None:
    """Exactly, once the causal half is taken into account: the reference multiplies the hidden half as well."""
    config = ModelConfig(
        dim=32, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=80, tie_embeddings=tie, qk_norm=True
    )
    model = Transformer(config).bfloat16()
    initialise(model, 0)
    for block in model.blocks.values():
        block.get_submodule("attention").core = WrittenOut()
    batch, seq = 3, 16
    tokens = torch.randint(0, 80, (batch, seq))
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).backward()
    attention = flops_per_token(config, seq) - flops_per_token(config, 0)
    assert counter.get_total_flops() == batch * seq * (flops_per_token(config, 0) + 2 * attention)
    assert attention == 6 * config.num_layers * config.dim * seq


@pytest.mark.parametrize("window", [1, 5, 16, 40])
def test_a_window_hides_keys(window: int) -> None:
    config, seq = ModelConfig(dim=32, num_layers=2, num_heads=4, window=window), 16
    attention = flops_per_token(config, seq) - flops_per_token(config, 0)
    visible = sum(min(position + 0.5, window) for position in range(seq)) / seq
    assert attention == pytest.approx(12 * config.num_layers * config.dim * visible)
