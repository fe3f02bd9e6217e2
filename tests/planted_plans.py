"""Mistakes that can be made in a plan, each planted by replacing one piece in this process."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch


def averaged_gradients(rank: int) -> None:
    from armillary.comm import collectives

    honest = collectives.reduce_scatter

    def average(output, input, **facts):
        work = honest(output, input, **facts)
        output.div_(facts["group"].size())
        return work

    collectives.reduce_scatter = average


def micro_batches_not_scaled(rank: int) -> None:
    from armillary.parallel.serial import Serial

    honest = Serial.forward_backward
    Serial.forward_backward = lambda self, parts, divisor: honest(self, parts, divisor / len(parts))


def pipeline_loss_scaled(rank: int) -> None:
    from armillary.parallel.pipeline.runner import Pipeline

    honest = Pipeline.forward_backward
    Pipeline.forward_backward = lambda self, parts, divisor: honest(self, parts, divisor * len(parts))


def replicas_not_summed(rank: int) -> None:
    from armillary.parallel import held

    held.sum_replicas = lambda gradients, cuts, **facts: None


def twin_gradient_not_passed(rank: int) -> None:
    from armillary.parallel.held import Held

    honest = Held.complete_gradients

    def complete(self):
        if self.twin is not None and self.twin.grad is not None:
            self.twin.grad.zero_()
        honest(self)

    Held.complete_gradients = complete


def twin_not_updated(rank: int) -> None:
    from armillary.train.optim.optimizers import Optimizers

    honest = Optimizers.__init__
    Optimizers.__init__ = lambda self, optimizers, names, after=None: honest(self, optimizers, names)


def reduction_skipped_on_a_stage(rank: int) -> None:
    from armillary.comm import collectives
    from armillary.parallel.pipeline.fsdp import Sharded

    reduce, honest = Sharded.reduce, collectives.reduce_scatter

    def own(output, input, **facts):
        kept = input.view(-1, *output.shape)[facts["group"].rank()].clone()
        honest(output, input, **facts)
        output.copy_(kept)

    def skipping(sharded):
        collectives.reduce_scatter = honest if sharded.root.begins else own
        reduce(sharded)
        collectives.reduce_scatter = honest

    Sharded.reduce = skipping


def places_off_by_one(rank: int) -> None:
    """Of one rank's rotary positions; a shift of all would change nothing."""
    from armillary.train.model import transformer as model

    honest = model.tables
    model.tables = lambda positions, *rest: honest(positions + (rank == 1), *rest)


def places_of_another_micro_batch(rank: int) -> None:
    from armillary.parallel.pipeline.stage import Stage

    honest = Stage.begin

    def begin(self, parts, divisor):
        if self.stage_index == 1:
            alike = [[q for q in parts if q.tokens.shape == p.tokens.shape and q is not p] for p in parts]
            parts = [replace(p, places=(other or [p])[0].places) for p, other in zip(parts, alike, strict=True)]
        honest(self, parts, divisor)

    Stage.begin = begin


def key_heads_off_by_one(rank: int) -> None:
    from armillary.parallel.tensor import cuts as tensor_cuts

    honest = tensor_cuts.head_parts

    def rotated(num_heads, kv_heads, degree):
        queries, keys = honest(num_heads, kv_heads, degree)
        return queries, keys[1:] + keys[:1]

    tensor_cuts.head_parts = rotated


def vocabulary_off_by_one(rank: int) -> None:
    from armillary.parallel.tensor import cut_model as tensor

    honest = tensor.VocabEmbedding
    tensor.VocabEmbedding = lambda weight, first, stream: honest(weight, first + (first > 0), stream)


def norm_counted_twice(rank: int) -> None:
    from armillary.parallel.held import Held

    Held.counted = lambda self: list(self.parameters().values())


def labels_counted_on_all_tensor_ranks(rank: int) -> None:
    from armillary.train.engine import Engine

    Engine._speaks = property(lambda self: self.ranks.pipeline.rank() == 0)


def muon_without_a_rank(rank: int) -> None:
    from armillary.train.optim.muon import Spread

    honest = Spread.of.__func__

    def of(cls, cut, plane):
        spread = honest(cls, cut, plane)
        return replace(spread, speaks=(*spread.speaks[:-1], False))

    Spread.of = classmethod(of)


def layers_of_a_stage_swapped(rank: int) -> None:
    from armillary.parallel import apply

    honest = apply.cut_to_stage

    def swapped(model, layers, begins, ends):
        honest(model, layers, begins, ends)
        blocks = list(model.blocks.items())
        for name, _ in blocks:
            del model.blocks[name]
        for name, block in reversed(blocks):
            model.blocks[name] = block

    apply.cut_to_stage = swapped


def recomputed_from_another_input(rank: int) -> None:
    from armillary.train.model import transformer as model

    honest = model.again

    def again(function: Callable[..., Any], *inputs: Any) -> Any:
        calls = []

        def twice(*inputs):
            calls.append(1)
            first, *rest = inputs
            return function(first if len(calls) == 1 else first + 1e-4 * torch.ones_like(first), *rest)

        return honest(twice, *inputs)

    model.again = again


def gradient_of_a_micro_batch_lost(rank: int) -> None:
    from armillary.parallel.serial import Serial

    honest = Serial.forward_backward
    Serial.forward_backward = lambda self, parts, divisor: honest(self, parts[: max(1, len(parts) - 1)], divisor)


def deferred_weight_gradients_lost(rank: int) -> None:
    """Of one micro-batch, where a schedule splits backward."""
    from armillary.parallel.pipeline import stage as pipeline_stage

    honest = pipeline_stage.Stage.backward_weight_one_chunk

    def lossy(self, micro_batch, last_backward=False):
        if micro_batch == 0 and self.stage_index == 1:
            self._owed[0] = []
        honest(self, micro_batch, last_backward)

    pipeline_stage.Stage.backward_weight_one_chunk = lossy


MISTAKES: dict[Callable[[int], None], dict[str, set[str]]] = {
    averaged_gradients: {"dp": {"2"}},
    micro_batches_not_scaled: {"schedule": {"none"}, "micro-batches": {"3"}},
    gradient_of_a_micro_batch_lost: {"schedule": {"none"}, "micro-batches": {"3"}},
    pipeline_loss_scaled: {"pp": {"2", "3", "4"}, "micro-batches": {"3"}},
    replicas_not_summed: {"tp": {"2", "3"}},
    twin_gradient_not_passed: {"schedule": {"1f1b", "gpipe"}, "embeddings": {"tied"}},
    twin_not_updated: {"schedule": {"1f1b", "gpipe"}, "embeddings": {"tied"}},
    reduction_skipped_on_a_stage: {"pp": {"2", "3", "4"}, "dp": {"2"}},
    places_off_by_one: {"context": {"ring", "token_ring", "all_gather"}, "tp": {"1"}},
    places_of_another_micro_batch: {"pp": {"2", "3"}, "micro-batches": {"3"}, "documents": {"many"}},
    key_heads_off_by_one: {"tp": {"2"}, "heads": {"6:2", "6:6"}},
    vocabulary_off_by_one: {"tp": {"2", "3"}},
    norm_counted_twice: {"tp": {"2", "3"}},
    labels_counted_on_all_tensor_ranks: {"tp": {"2", "3"}},
    muon_without_a_rank: {"optimizer": {"muon"}, "tp": {"2", "3"}},
    layers_of_a_stage_swapped: {"schedule": {"1f1b", "gpipe"}, "pp": {"2"}},
    recomputed_from_another_input: {"recompute": {"full"}},
    deferred_weight_gradients_lost: {"schedule": {"zb1p", "zbv"}},
}
"""Each with the levels of which a case must have one, for the mistake to concern it."""
