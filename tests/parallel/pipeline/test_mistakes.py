"""Mistakes planted in a pipeline are found by the comparison with one process."""

import pytest
import torch
from pipeline_cases import Case, on_rank, problems

from armillary.parallel.pipeline import split_backward as pipeline_split
from armillary.parallel.pipeline import stage as pipeline_stage
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
    begin = pipeline_stage.Stage.begin
    pipeline_stage.Stage.begin = lambda self, parts, divisor: begin(self, parts, divisor * max(1, len(parts)))


def forget_a_weight(rank: int) -> None:
    """Of what was put off, the last is never computed."""
    pay = pipeline_split.pay
    pipeline_stage.pay = lambda owed: pay(owed[:-1])


def forget_a_bias(rank: int) -> None:
    pay = pipeline_split.pay
    pipeline_stage.pay = lambda owed: pay([(weight, None, x, d) for weight, _, x, d in owed])


def keep_the_last_step(rank: int) -> None:
    """A step's gradients replace those of the step before."""
    begin = pipeline_stage.Stage.begin

    def forgetful(self, parts, divisor):
        self.submod.zero_grad()
        begin(self, parts, divisor)

    pipeline_stage.Stage.begin = forgetful


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
