"""Mistakes planted in a pipeline are found by the comparison with one process."""

import pytest
import torch
from pipeline_cases import Case, on_rank, problems

from armillary.parallel.pipeline import stage
from armillary.parallel.pipeline.later import pay
from armillary.parallel.pipeline.mail import Mail


def lose_a_gradient(rank: int) -> None:
    """One message of a gradient arrives empty."""
    send = Mail.send

    def lossy(self, letter, tensor):
        lost = not letter.forward and letter.micro_batch == 2
        send(self, letter, torch.zeros_like(tensor) if lost else tensor)

    Mail.send = lossy


def turn_gradients(rank: int) -> None:
    """Gradients arrive with their tokens in reverse."""
    take = Mail.open
    Mail.open = lambda self, letter: take(self, letter) if letter.forward else take(self, letter).flip(1)


def scale_the_loss(rank: int) -> None:
    """The divisor is that of another number of micro-batches."""
    begin = stage.Stage.begin
    stage.Stage.begin = lambda self, parts, divisor: begin(self, parts, divisor * max(1, len(parts)))


def forget_a_weight(rank: int) -> None:
    """Of what was put off, the last is never computed."""
    stage.pay = lambda owed: pay(owed[:-1])


def forget_a_bias(rank: int) -> None:
    stage.pay = lambda owed: pay([one._replace(bias=None) for one in owed])


def keep_the_last_step(rank: int) -> None:
    """A step's gradients replace those of the step before."""
    begin = stage.Stage.begin

    def forgetful(self, parts, divisor):
        self.submod.zero_grad()
        begin(self, parts, divisor)

    stage.Stage.begin = forgetful


MISTAKES = {
    mistake.__name__: mistake
    for mistake in (
        lose_a_gradient,
        turn_gradients,
        scale_the_loss,
        forget_a_weight,
        forget_a_bias,
        keep_the_last_step,
    )
}
CASE = Case("zb1p", num_parts=4, qkv_bias=True, tied=False)


def mistaken(rank: int, name: str):
    MISTAKES[name](rank)
    return on_rank(rank, CASE)


@pytest.mark.parametrize("name", MISTAKES)
def test_found(world, name):
    wrong = problems(world(mistaken, 2, name), CASE, 2)
    assert wrong
    assert any("loss" in line for line in wrong) == (name == "scale_the_loss")
