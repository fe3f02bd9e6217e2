"""Ranks, devices and groups: the one place where process groups are created."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from armillary.comm.collectives import all_reduce, broadcast_text
from armillary.comm.ledger import Ledger
from armillary.parallel.plan import DEGREES, Plan

TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Ranks:
    """What one rank knows of the others: its mesh, its groups, and the ledger of what it sends."""

    mesh: DeviceMesh
    """Axes pp, dp, cp and tp, from the outermost in."""
    plane: DeviceMesh
    """The data plane, one axis: dp and cp as one, the ranks that hold the same parameters and shard their state."""
    stage: dist.ProcessGroup
    """The ranks that hold a part of this one's layers: plane and tensor axis as one, the latter innermost."""
    everyone: dist.ProcessGroup
    """All ranks of the run."""
    device: torch.device
    rank: int
    num_ranks: int
    ledger: Ledger = field(default_factory=Ledger)

    def agree(self, text: str, source: int = 0) -> str:
        """The text of one rank, on every rank."""
        talk = {"group": self.everyone, "ledger": self.ledger, "purpose": "setup"}
        return broadcast_text(text, device=self.device, source=source, **talk)  # type: ignore[arg-type]

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers, on every rank."""
        tensor = torch.tensor(number, device=self.device)
        operation = dist.ReduceOp.MAX
        all_reduce(tensor, group=self.everyone, ledger=self.ledger, purpose="setup", op=operation)
        return int(tensor)

    @property
    def pipeline(self) -> dist.ProcessGroup:
        """The ranks that hold the other layers for this one's micro-batches."""
        # Not mesh["pp"].get_group(), which builds a mesh, 0.3 ms each time.
        return self.mesh.get_group("pp")

    @property
    def data(self) -> dist.ProcessGroup:
        """The ranks that compute different sequences, this one among them."""
        return self.mesh.get_group("dp")

    @property
    def context(self) -> dist.ProcessGroup:
        """The ranks that share this one's sequences."""
        return self.mesh.get_group("cp")

    @property
    def tensor(self) -> dist.ProcessGroup:
        """The ranks that share this one's layers and tokens."""
        return self.mesh.get_group("tp")


def make_ranks(plan: Plan, device: torch.device) -> Ranks:
    """The mesh of a plan over the ranks of the default process group.

    Raises:
        ValueError: if the number of started ranks is not the plan's.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    check_num_ranks(plan, num_ranks)
    degrees = tuple(getattr(plan, axis) for axis in DEGREES)
    mesh = init_device_mesh(device.type, degrees, mesh_dim_names=DEGREES)
    plane = mesh["dp", "cp"]._flatten("plane")
    stage = mesh["dp", "cp", "tp"]._flatten("stage").get_group()
    everyone = dist.group.WORLD
    assert everyone is not None
    return Ranks(mesh, plane, stage, everyone, device, rank, num_ranks)


def check_num_ranks(plan: Plan, num_ranks: int) -> None:
    """Refuses a plan for another number of ranks than were started."""
    if plan.num_ranks != num_ranks:
        raise ValueError(
            f"plan ({plan}) needs {plan.num_ranks} ranks, but {num_ranks} were started; "
            f"start {plan.num_ranks}, or set the degrees so that their product is {num_ranks} "
            f'(for example --plan "dp={num_ranks}")'
        )


def own_device() -> torch.device:
    """This rank's GPU, where this machine has one for each of its ranks; else the CPU.

    Raises:
        ValueError: if there are GPUs, but nothing says which one is this rank's.
    """
    if not torch.cuda.is_available() or torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        return torch.device("cpu")
    if "RANK" in os.environ and "LOCAL_RANK" not in os.environ:
        raise ValueError("LOCAL_RANK is not set, so this rank does not know its GPU; start the ranks with torchrun")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def joined_ranks(plan: Plan, device: torch.device | None = None) -> Iterator[Ranks]:
    """Joins the ranks that torchrun started (one process alone is a run of one rank), and leaves them at the end.

    Args:
        plan: what the ranks are for.
        device: this rank's; `own_device()` when left out.

    Raises:
        ValueError: if the number of ranks does not fit the plan, or the port of the rendezvous is in use.
    """
    device = device or own_device()
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    if "RANK" in os.environ:
        check_num_ranks(plan, int(os.environ["WORLD_SIZE"]))
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
        except dist.DistNetworkError as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ValueError(
                f"the ranks cannot meet at {where} ({str(error).splitlines()[0]}); if the port is in use, set "
                "MASTER_PORT to a free one or give torchrun --standalone"
            ) from error
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield make_ranks(plan, device)
    except BaseException:
        # NCCL may wait here for ranks that are in a collective, and this one's reason would never be told.
        if backend != "nccl":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
