"""Runs that go on under another plan: what each side of a crossing does, on the ranks of one world."""

import os
import time
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_run import make_trainer
from torch import Tensor

from armillary.parallel.held import EMBEDDING, local, part_of
from armillary.train.checkpoint import load as checkpoint_read
from armillary.train.checkpoint.local_part import DTYPES
from armillary.train.checkpoint.restore import own_state, parameter_of, shared_state
from armillary.train.checkpoint.store import complete, read_manifest
from armillary.train.config.run_config import RunConfig, load_config
from armillary.train.run_folder import create_run, open_run
from armillary.train.trainer import Trainer

CONFIG = """
[model]
dim = 20
num_layers = 5
num_heads = 4
num_kv_heads = 2
head_dim = 6
ffn_dim = 23
vocab_size = 257
[data]
sequence_length = 16
batch_size = 6
tokenizer = "bytes"
sources = [{path = "text.txt"}]
cache = "cache"
[optim]
steps = 9
learning_rate = 1e-2
micro_batches = 3
[checkpoint]
every = 3
[metrics]
wandb = "off"
"""
SAVED, TRAINED = 3, 5
"""Steps after which a run is saved, and up to which it is followed."""
CURSOR = 7
"""Sequences that a run has left out before its first step, so that no cursor follows from a step."""


@dataclass(frozen=True)
class Crossing:
    """A run that is saved under one plan and goes on under another."""

    source: str
    target: str
    model: str = ""
    kind: str = "adamw"
    precision: str = "float64"

    def config(self, plan: str) -> RunConfig:
        settings = [*self.model.split(), f"optim.kind={self.kind}", f"optim.precision={self.precision}"]
        return load_config("run.toml", [*settings, *(f"plan.{item}" for item in plan.split())])

    def __str__(self) -> str:
        return (
            f"{self.source} -> {self.target} ({self.kind}, {self.precision}{', ' + self.model if self.model else ''})"
        )


UNTIED = "model.tie_embeddings=false"
CROSSINGS = [
    Crossing("tp=2 pp=2", "cp=4", UNTIED),
    Crossing("pp=2 dp=2 tp=2", "dp=3", kind="muon"),
    Crossing("dp=1", "pp=2 cp=2 tp=2"),
    Crossing("pp=2 dp=2 schedule=zbv", "tp=3", kind="muon"),
    Crossing("dp=4", "pp=4 schedule=interleaved", f"{UNTIED} model.num_layers=8"),
    Crossing("pp=4 layers=[1,1,2,1]", "pp=4 layers=[0,2,1,2]"),
    Crossing("tp=4", "dp=2 tp=2", "model.qkv_bias=true model.qk_norm=true", kind="muon"),
    Crossing("tp=2 pp=2", "dp=2 cp=2", precision="bfloat16"),
    Crossing("dp=2 cp=2", "dp=1", UNTIED, kind="muon", precision="bfloat16"),
    Crossing("pp=2 dp=2", "cp=2 tp=2", kind="muon", precision="float32"),
]


def num_ranks(plan: str) -> int:
    """Of a plan as `Crossing` writes it."""
    degrees = [int(item.split("=")[1]) for item in plan.split() if item[:2] in ("pp", "dp", "cp", "tp")]
    return int(torch.tensor(degrees).prod())


def train(trainer: Trainer, until: int) -> list[float]:
    """Goes on to a step; returns the losses."""
    losses, honest = [], trainer.engine.forward_backward

    def recorded(batches):
        losses.append(honest(batches))
        return losses[-1]

    trainer.engine.forward_backward = recorded
    while trainer.progress.step < until:
        trainer.train_step()
    trainer.engine.forward_backward = honest
    return [float(loss) for loss in losses]


def save(trainer: Trainer, run: str) -> None:
    trainer.checkpointer.folder = open_run(run).checkpoints
    trainer.save_if_due()
    trainer.checkpointer.wait()
    assert trainer.checkpointer.failure is None, trainer.checkpointer.failure
    dist.barrier()


def gathered(trainer: Trainer, run: str) -> dict[str, Tensor]:
    """Every weight and moment put together, on all ranks; a count as this rank has it, if it has one."""
    stored = read_manifest(complete(open_run(run).checkpoints)[0]).tensors
    here = {f"model/{name}": parameter for name, parameter in trainer.held.parameters().items()}
    here |= trainer.optimizers.state_tensors()
    found, by_dtype = {}, {}
    for name in sorted(name for name in stored if not name.startswith("rank-")):
        if stored[name].shape:
            by_dtype.setdefault(stored[name].dtype, []).append(name)
        elif name in here:
            found[name] = here[name].clone()
    for dtype, names in by_dtype.items():
        # Together: one after the other, ranks that share cores would mostly wait for each other.
        parts = [(parameter_of(name), here.get(name)) for name in names]
        found |= zip(names, trainer.held.wholes(parts, DTYPES[dtype], "test"), strict=True)
    return found


def different(trainer: Trainer, run: str, want: dict[str, Tensor], tolerance: float = 0.0) -> list[str]:
    """What is not as it was recorded: bit for bit, or in relation to the largest value of a tensor."""
    wrong = []
    found = gathered(trainer, run)
    for name, tensor in want.items():
        if name not in found:
            if tensor.ndim or parameter_of(name) in trainer.held.parameters():
                wrong.append(f"{name} is missing")
            continue
        off = float((found[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-30))
        if found[name].dtype != tensor.dtype or not (torch.equal(found[name], tensor) or off < tolerance):
            wrong.append(f"{name} is off by {off:.1e}")
    twin = trainer.held.twin
    if twin is not None and not tolerance:
        part = part_of(want[f"model/{EMBEDDING}"], trainer.held.box(EMBEDDING))
        wrong += [] if torch.equal(local(twin), part) else ["the twin is not its original"]
    return wrong


# ---- The bytes of a load ---------------------------------------------------------------------------------------------


class CountedFile:
    """safetensors' file, whose reads are counted by name."""

    reads: list[tuple[str, int]] = []

    def __init__(self, path: str, framework: str) -> None:
        self.file = safe_open(path, framework=framework)

    def __enter__(self) -> "CountedFile":
        self.file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.file.__exit__(*error)

    def get_tensor(self, name: str) -> Tensor:
        tensor = self.file.get_tensor(name)
        self.reads.append((name, tensor.nbytes))
        return tensor

    def get_slice(self, name: str) -> "CountedSlice":
        return CountedSlice(name, self.file.get_slice(name))


class CountedSlice:
    """A tensor in a file: nothing of it is read before a part is asked for."""

    def __init__(self, name: str, inner: object) -> None:
        self.name, self.inner = name, inner
        self.get_dtype, self.get_shape = inner.get_dtype, inner.get_shape

    def __getitem__(self, where: tuple[slice, ...]) -> Tensor:
        tensor = self.inner[where]
        CountedFile.reads.append((self.name, tensor.nbytes))
        return tensor


def unneeded(trainer: Trainer, same_ranks: bool) -> list[str]:
    """What was read that is not this rank's; every byte that is, was read once."""
    own = {f"rank-{trainer.ranks.rank}/{name}": tensor.nbytes for name, tensor in own_state().items()}
    want = {name: part.data.nbytes for name, part in shared_state(trainer.held, trainer.optimizers).items()}
    want |= own if same_ranks else {}
    got = dict.fromkeys(want, 0)
    for name, size in CountedFile.reads:
        got[name] = got.get(name, 0) + size
    return [
        f"{name}: {got[name]} bytes were read, {want.get(name, 0)} needed"
        for name in got
        if got[name] != want.get(name)
    ]


# ---- The three sides of a crossing -----------------------------------------------------------------------------------


def leave(rank: int, folder: str, numbers: list[int]) -> dict[int, dict[str, object]]:
    """The run as it begins, is saved, and would have gone on."""
    os.chdir(folder)
    for number in numbers:
        case, run = CROSSINGS[number], f"run{number}"
        trainer = make_trainer(rank, case.config(case.source), run)
        trainer.begin()
        trainer.progress = replace(trainer.progress, cursor=CURSOR)
        trainer.guard.rollbacks = 1
        train(trainer, SAVED)
        save(trainer, run)
        saved = gathered(trainer, run)
        losses = train(trainer, TRAINED)
        after = gathered(trainer, run)
        if rank == 0:
            # Counts of other stages are not here, and are those of all.
            for name in read_manifest(complete(open_run(run).checkpoints)[0]).tensors:
                if name.startswith("optimizer/step/"):
                    saved[name], after[name] = torch.tensor(float(SAVED)), torch.tensor(float(TRAINED))
            save_file(saved, "saved.safetensors" + str(number))
            save_file(after | {"losses": torch.tensor(losses, dtype=torch.float64)}, f"after.safetensors{number}")
        trainer.observer.close("finished")
    return {number: {} for number in numbers}


def arrive(rank: int, folder: str, numbers: list[int]) -> dict[int, dict[str, object]]:
    """Loads under the other plan, saves it there, and goes on."""
    os.chdir(folder)
    checkpoint_read.safe_open = CountedFile
    found = {}
    for number in numbers:
        case, run = CROSSINGS[number], f"run{number}"
        trainer = make_trainer(rank, case.config(case.target), run)
        CountedFile.reads = []
        started = time.perf_counter()
        facts = trainer.restore()
        seconds = time.perf_counter() - started
        wrong = unneeded(trainer, num_ranks(case.source) == num_ranks(case.target))
        trainer.guard.restore(facts["guard"])
        wrong += different(trainer, run, load_file(f"saved.safetensors{number}"))
        wrong += [] if trainer.guard.state() == {"skips": 0, "rollbacks": 1} else ["the guard"]
        place = (trainer.progress.step, trainer.progress.cursor, trainer.progress.tokens)
        wrong += [] if place == (SAVED, CURSOR + SAVED * 6, SAVED * 6 * 16) else [f"stands at {place}"]
        if rank == 0:
            create_run(trainer.config, "run.toml", f"back{number}", trainer.dataset.tokenizer)
        dist.barrier()
        save(trainer, f"back{number}")
        if case.precision == "float64":
            want = load_file(f"after.safetensors{number}")
            losses = train(trainer, TRAINED)
            error = float((torch.tensor(losses, dtype=torch.float64) - want.pop("losses")).abs().max())
            wrong += [f"losses are off by {error:.1e}"] if not error < 1e-9 else []
            wrong += different(trainer, run, want, 1e-9)
        trainer.observer.close("finished")
        found[number] = {"wrong": wrong, "seconds": seconds, "read": sum(size for _, size in CountedFile.reads)}
    return found


def come_back(rank: int, folder: str, numbers: list[int]) -> dict[int, dict[str, object]]:
    """Loads what the other plan saved, under the first."""
    os.chdir(folder)
    found = {}
    for number in numbers:
        case, run = CROSSINGS[number], f"back{number}"
        trainer = make_trainer(rank, case.config(case.source), run)
        trainer.restore()
        found[number] = {"wrong": different(trainer, run, load_file(f"saved.safetensors{number}"))}
        trainer.observer.close("finished")
    return found
