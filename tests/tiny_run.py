"""A run that is small enough for any test: its config and its text."""

from pathlib import Path

CONFIG = """
[model]
dim = 24
num_layers = 2
num_heads = 3
vocab_size = 257
[data]
sequence_length = 32
batch_size = 6
tokenizer = "bytes"
held_out = 0.3
sources = [{path = "text"}]
cache = "cache"
[optim]
learning_rate = 1e-2
precision = "float32"
[metrics]
wandb = "off"
"""


def write_run(folder: Path) -> None:
    """`run.toml`, and in `text/` what it reads; the paths are relative."""
    (folder / "run.toml").write_text(CONFIG)
    (folder / "text").mkdir()
    for number in range(20):
        (folder / f"text/{number}.txt").write_text(f"{number}: the quick brown fox jumps over the lazy dog. " * 5)
