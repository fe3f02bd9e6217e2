"""The parity matrix: every pair of features that a run can have at once, in as few runs as a greedy search finds.

Most mistakes of a composed system need two features to show, seldom three (Kuhn, Wallace and Gallo, IEEE TSE 30, 2004);
so a set of cases in which every pair of levels occurs finds most of what the product of all finds, at a thousandth of
its cost. A pair that the config refuses is named with the config's own sentence. Imports no torch.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from armillary.train.config.run_config import RunConfig
from armillary.train.data.config import DataConfig
from armillary.train.model.shape import ModelConfig
from armillary.train.optim.schedule import OptimConfig

MOST_RANKS = 8

Case = dict[str, str]
"""The level of every feature."""
Pair = tuple[tuple[str, str], tuple[str, str]]
"""Two features, in the order of FEATURES, each with a level."""

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipev", "synthesised")
STRATEGIES = ("ring", "bidirectional_ring", "token_ring", "ulysses", "all_gather", "hybrid")

FEATURES: dict[str, dict[str, dict[str, Any]]] = {
    "schedule": {"none": {}} | {name: {"plan.schedule": name} for name in SCHEDULES},
    "pp": {str(degree): {"plan.pp": degree} for degree in (1, 2, 3, 4)},
    "context": {"none": {}}
    | {name: {"plan.cp": 4 if name == "hybrid" else 2, "plan.context": name} for name in STRATEGIES},
    "tp": {str(degree): {"plan.tp": degree} for degree in (1, 2, 3)},
    "dp": {str(degree): {"plan.dp": degree} for degree in (1, 2)},
    "zero": {"fsdp, 3": {}, "fsdp, 2": {"partition.weights": "rank"}}
    | {f"deepspeed, {stage}": {"zero.engine": "deepspeed", "zero.stage": stage} for stage in (1, 2, 3)},
    "recompute": {kind: {"plan.recompute": kind} for kind in ("none", "selective", "full")},
    "compile": {"off": {}, "on": {"plan.compile": True}},
    "micro-batches": {str(number): {"optim.micro_batches": number} for number in (1, 3)},
    "embeddings": {"tied": {"model.tie_embeddings": True}, "untied": {"model.tie_embeddings": False}},
    "heads": {f"6:{number}": {"model.num_kv_heads": number} for number in (6, 2, 1)},
    "norms": {"plain": {}, "qk norm, bias": {"model.qk_norm": True, "model.qkv_bias": True}},
    "documents": {"many": {}, "one": {}},
    # AdamW's first steps have the size of its rate, however small a gradient is: roundings around 0 would decide where
    # to, and the runs drift apart. Not so with an eps as large as gradients are.
    "precision": {
        "float64": {"optim.precision": "float64"},
        "bfloat16": {"optim.precision": "bfloat16", "optim.eps": 1e-2},
    },
    "optimizer": {kind: {"optim.kind": kind} for kind in ("adamw", "muon")},
}
"""Of each feature its levels, the plainest first, and what each sets in a config."""

LENGTHS = {"many": (9, 1, 14, 4, 30, 2, 7, 21, 3, 11, 40, 5, 6, 17, 8, 33, 12, 19), "one": (750,)}
"""Tokens of the documents that are packed into the sequences: with `one`, each sequence is a part of one document."""

BASE = RunConfig(
    model=ModelConfig(dim=36, num_layers=4, num_heads=6, ffn_dim=50, vocab_size=261),
    data=DataConfig(sequence_length=33, batch_size=7, tokenizer="bytes", held_out=0.0),
    # A step large enough that what is wrong in one gradient is in all of the next step's; clipped, so that the norm of
    # the whole gradient is in all of the parameters.
    optim=OptimConfig(learning_rate=1e-2, steps=9, clip_norm=0.5),
)
"""What all cases share. Nothing divides anything: heads, channels, tokens, sequences, vocabulary, layers."""

STEPS = 3

ALLOWED = {"float64": 1e-9, "bfloat16": 2.0}
"""Of the worst relative error; of the worst ratio to the error of one process. See train/proof/matrix_case.py."""


def config_of(case: Mapping[str, str]) -> RunConfig:
    """The config of a case; with four layers, or as many as the pipeline has stages."""
    config = BASE
    for feature, level in case.items():
        for key, value in FEATURES[feature][level].items():
            section, _, name = key.partition(".")
            config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    layers = max(BASE.model.num_layers, config.plan.num_stages)
    return replace(config, model=replace(config.model, num_layers=layers))


def refused(config: RunConfig) -> list[str]:
    """What `load_config` would say against a config, one sentence each."""
    parts = [("", config)] + [(f"{f.name}.", getattr(config, f.name)) for f in fields(config)]
    found = []
    for prefix, part in parts:
        if is_dataclass(part) and hasattr(part, "problems"):
            found += [f"{prefix}{key}: {sentence}" for key, sentence in part.problems()]
    return found


def complete(partial: Mapping[str, str]) -> Case:
    """A case with these levels, and of all other features the plainest that goes with them."""
    case = {feature: partial.get(feature, next(iter(levels))) for feature, levels in FEATURES.items()}
    if "pp" not in partial and case["schedule"] != "none":
        case["pp"] = "2"
    if "schedule" not in partial and case["pp"] != "1":
        case["schedule"] = "1f1b"
    if "dp" not in partial and "context" not in partial and _needs_plane(case):
        case["dp"] = "2"
    return case


def _needs_plane(case: Mapping[str, str]) -> bool:
    """Whether a case has something that shards, which only shows where there are ranks to shard over."""
    return case["zero"] != "fsdp, 3"


def means_something(case: Case) -> bool:
    """Whether the levels go together at all, on at most MOST_RANKS ranks; the config may still refuse them."""
    if (case["schedule"] == "none") != (case["pp"] == "1"):
        return False
    if case["dp"] == "1" and case["context"] == "none" and _needs_plane(case):
        return False
    return num_ranks(case) <= MOST_RANKS


def num_ranks(case: Case) -> int:
    context = {"none": 1, "hybrid": 4}.get(case["context"], 2)
    return int(case["pp"]) * int(case["dp"]) * int(case["tp"]) * context


def pairs_of(case: Mapping[str, str]) -> Iterator[Pair]:
    """Every two levels of a case."""
    ordered = [(feature, case[feature]) for feature in FEATURES if feature in case]
    yield from itertools.combinations(ordered, 2)


@cache
def all_pairs() -> tuple[tuple[Pair, ...], dict[Pair, str]]:
    """The pairs of levels that can occur within MOST_RANKS ranks; and those of them that the config refuses, each with
    its sentence."""
    possible, turned_down = [], {}
    for first, second in itertools.combinations(FEATURES, 2):
        for levels in itertools.product(FEATURES[first], FEATURES[second]):
            pair = ((first, levels[0]), (second, levels[1]))
            case = _simplest(dict(pair))
            if case is None:
                continue
            if sentences := refused(config_of(case)):
                turned_down[pair] = sentences[0]
            else:
                possible.append(pair)
    return tuple(possible), turned_down


def _simplest(partial: Mapping[str, str]) -> Case | None:
    """The plainest case with these levels that means something, or None."""
    case = complete(partial)
    if means_something(case):
        return case
    for feature, level in (("dp", "2"), ("context", "ring")):
        if feature not in partial:
            case = complete({**partial, feature: level})
            if means_something(case):
                return case
    return None


@cache
def covering_set() -> tuple[Case, ...]:
    """Cases that together have every pair of `all_pairs`; the same in every process.

    Greedy: of several cases that grow from pairs still missing, level by level, each level chosen for the pairs that it
    adds, the one is taken that adds most for what it costs. Where a level adds none, the one is chosen whose pairs were
    had least often, so that no case is plainer than it must be: each is a chance for a mistake that takes three
    features to show. What is slow to run (compile, DeepSpeed, many ranks) or sees less (bfloat16) is not chosen so.

    Every pair of features that are neither precision nor engine is also in a case in float64 with our own engine.
    """
    possible, _ = all_pairs()
    times = dict.fromkeys(possible, 0)
    exact = [pair for pair in possible if not {"precision", "zero"} & {feature for feature, _ in pair}]
    found = []
    for wanted, also in ((exact, {"precision": "float64", "zero": "fsdp, 3"}), (possible, {})):
        while missing := [pair for pair in wanted if not times[pair]]:
            seeds = missing[:: max(1, len(missing) // SEEDS)]
            grown = [_grow({**dict(seed), **also}, times) for seed in seeds]
            best = max(grown, key=lambda case: sum(not times[pair] for pair in pairs_of(case)) / cost(case))
            found.append(best)
            for pair in pairs_of(best):
                times[pair] += 1
    return tuple(found)


def is_exact(case: Mapping[str, str]) -> bool:
    """Whether rounding can hide nothing in a case, and it is our own engine's."""
    return case["precision"] == "float64" and case["zero"].startswith("fsdp")


SEEDS = 8
LAST_CHOICE = {("compile", "on"), ("precision", "bfloat16"), ("tp", "3"), ("dp", "2"), ("pp", "3"), ("pp", "4")}


def cost(case: Case) -> float:
    """What a case costs, roughly: processor time, in that of a rank of a plain case."""
    ranks = num_ranks(case)
    return 3 + ranks * (1 + 2 * (case["compile"] == "on") + 1.5 * ("deepspeed" in case["zero"]))


def _grow(case: Case, times: Mapping[Pair, int]) -> Case:
    """A whole case around a pair.

    Args:
        times: how often each possible pair has been had.
    """
    for feature in sorted(set(FEATURES) - set(case), key=lambda name: (-len(FEATURES[name]), name)):
        ranked: list[tuple[int, bool, int, int, str]] = []
        for level in FEATURES[feature]:
            joined = list(_joined(case, feature, level))
            if all(pair in times for pair in joined) and _simplest({**case, feature: level}) is not None:
                slow = (feature, level) in LAST_CHOICE or level.startswith("deepspeed")
                added = sum(not times[pair] for pair in joined)
                ranked.append((-added, slow, sum(times[pair] for pair in joined), len(ranked), level))
        assert ranked, f"no level of {feature} goes with {case}"
        case = {**case, feature: min(ranked)[-1]}
    return {feature: case[feature] for feature in FEATURES}


def _joined(case: Mapping[str, str], feature: str, level: str) -> Iterator[Pair]:
    """The pairs of one more level with those that a case has."""
    order = list(FEATURES)
    for other, own in case.items():
        pair = ((other, own), (feature, level))
        yield pair if order.index(other) < order.index(feature) else (pair[1], pair[0])


def sample(count: int, seed: int = 0) -> list[Case]:
    """`count` different cases of the full product, drawn at random; 0 for all of them, in order."""
    every = (dict(zip(FEATURES, levels, strict=True)) for levels in itertools.product(*FEATURES.values()))
    if not count:
        return [case for case in every if is_case(case)]
    bits = np.random.default_rng(seed)
    found: dict[str, Case] = {}
    while len(found) < count:
        case = {feature: list(levels)[bits.integers(len(levels))] for feature, levels in FEATURES.items()}
        if is_case(case):
            found[title(case)] = case
    return list(found.values())


def is_case(case: Case) -> bool:
    """Whether a case means something and is not refused."""
    return means_something(case) and not refused(config_of(case))


def title(case: Mapping[str, str]) -> str:
    """A case in one line: its levels other than the plainest."""
    said = [f"{feature} {level}" for feature, level in case.items() if level != next(iter(FEATURES[feature]))]
    return "; ".join(said) or "plain"


def uncovered(cases: Iterable[Mapping[str, str]]) -> list[Pair]:
    """The possible pairs that no case has."""
    had = {pair for case in cases for pair in pairs_of(case)}
    return [pair for pair in all_pairs()[0] if pair not in had]
