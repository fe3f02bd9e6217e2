"""A run that is small enough for any test: its config, its text, and a trainer of it."""

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
held_out = 0.2
sources = [{path = "text"}]
cache = "cache"
[optim]
learning_rate = 1e-2
precision = "float32"
[metrics]
wandb = "off"
evaluate_sequences = 4
"""


def write_run(folder: Path, more: str = "") -> None:
    """Writes `run.toml`, in which `more` comes last, and the documents that it reads, of uneven lengths, in `text/`."""
    (folder / "tiny.toml").write_text(CONFIG)
    (folder / "run.toml").write_text(f'extends = "tiny.toml"\n{more}')
    (folder / "text").mkdir()
    for number in range(20):
        text = f"document {number}: " + "the quick brown fox. " * (number % 5 + 1)
        (folder / f"text/{number}.txt").write_text(text)


def make_trainer(rank, config, run, attempt="test"):
    """A trainer on the ranks of a world, in whose folder it was called; makes the run where it is new."""
    import torch
    import torch.distributed as dist

    from armillary.parallel.mesh import make_ranks
    from armillary.train.data.dataset import prepare
    from armillary.train.run_folder import create_run, open_run
    from armillary.train.trainer import Trainer

    ranks = make_ranks(config.plan, torch.device("cpu"))
    dataset = prepare(config.data)
    if rank == 0 and not Path("runs", run).exists():
        create_run(config, "run.toml", run, dataset.tokenizer)
    dist.barrier()
    return Trainer(config, ranks, open_run(run), dataset, attempt)
