"""Ranks, devices and groups: the one place where process groups are created."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from armillary.comm.ledger import Ledger
from armillary.parallel.plan import Plan

TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Ranks:
    """What one rank knows of the others: its mesh, its groups, and the ledger of what it sends."""

    mesh: DeviceMesh
    device: torch.device
    rank: int
    num_ranks: int
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def everyone(self) -> dist.ProcessGroup:
        """All ranks of the run."""
        return self.mesh["dp"].get_group()

    @property
    def data(self) -> dist.ProcessGroup:
        """The ranks that compute different sequences."""
        return self.mesh["dp"].get_group()


def make_ranks(plan: Plan, device: torch.device) -> Ranks:
    """The mesh of a plan over the ranks of the default process group.

    Raises:
        ValueError: if the number of started ranks is not the plan's.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    check_num_ranks(plan, num_ranks)
    mesh = init_device_mesh(device.type, (plan.dp,), mesh_dim_names=("dp",))
    return Ranks(mesh, device, rank, num_ranks)


def check_num_ranks(plan: Plan, num_ranks: int) -> None:
    """Refuses a plan for another number of ranks than were started."""
    if plan.num_ranks != num_ranks:
        raise ValueError(
            f"plan ({plan}) needs {plan.num_ranks} ranks, but {num_ranks} were started; "
            f"start {plan.num_ranks}, or set the degrees so that their product is {num_ranks} "
            f'(for example --plan "dp={num_ranks}")'
        )


def own_device() -> torch.device:
    """This rank's device: its GPU where there are any, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def joined_ranks(plan: Plan) -> Iterator[Ranks]:
    """Joins the ranks that torchrun started (one process alone is a run of one rank), and leaves them at the end.

    Raises:
        ValueError: if the number of ranks does not fit the plan, or the port of the rendezvous is in use.
    """
    device = own_device()
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
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
    finally:
        dist.destroy_process_group()
