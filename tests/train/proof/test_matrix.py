"""The parity matrix: its set of cases has every pair, what it leaves out is refused, and every case holds."""

import itertools
import os
from dataclasses import replace

import pytest

from armillary.launch.matrix_ranks import judge_on_ranks
from armillary.train.config.run_config import ConfigError, load_config
from armillary.train.proof.matrix import (
    BASE,
    FEATURES,
    MOST_RANKS,
    all_pairs,
    complete,
    config_of,
    covering_set,
    is_case,
    is_exact,
    means_something,
    num_ranks,
    pairs_of,
    refused,
    sample,
    title,
    uncovered,
)
from armillary.train.proof.matrix_case import KINDS, error_of


def test_every_pair_that_can_occur_is_in_a_case():
    cases = covering_set()
    assert uncovered(cases) == []
    assert all(set(case) == set(FEATURES) and is_case(case) for case in cases)
    assert max(map(num_ranks, cases)) == MOST_RANKS
    assert len(cases) <= 100
    # The test can fail: no case is one too many for all of its pairs.
    assert sum(bool(uncovered([c for c in cases if c is not case])) for case in cases) > len(cases) / 2


def test_every_pair_is_also_in_a_case_where_rounding_hides_nothing():
    """Pairs of precision or engine aside: those are had in what they are about."""
    exact = {pair for case in covering_set() if is_exact(case) for pair in pairs_of(case)}
    others = [pair for pair in all_pairs()[0] if not {"precision", "zero"} & {feature for feature, _ in pair}]
    assert [pair for pair in others if pair not in exact] == []


def test_a_pair_is_left_out_only_where_no_case_can_have_it():
    """By trying all levels of the features that decide it."""
    possible, turned_down = all_pairs()
    deciding = {name: FEATURES[name] for name in ("schedule", "pp", "context", "tp", "dp", "zero")}
    others = {name: next(iter(levels)) for name, levels in FEATURES.items() if name not in deciding}
    seen = set()
    for levels in itertools.product(*deciding.values()):
        case = {**others, **dict(zip(deciding, levels, strict=True))}
        case = {feature: case[feature] for feature in FEATURES}
        if means_something(case) and not refused(config_of(case)):
            seen.update(pair for pair in pairs_of(case) if {pair[0][0], pair[1][0]} <= set(deciding))
    found = {pair for pair in possible if {pair[0][0], pair[1][0]} <= set(deciding)}
    assert found == seen
    assert not set(possible) & set(turned_down)


def test_what_is_refused_is_refused_before_a_rank_starts(tmp_path):
    """By load_config itself, with the sentence that the matrix prints."""
    (tmp_path / "run.toml").write_text("[model]\ndim = 36\nnum_heads = 6\nnum_layers = 8\nvocab_size = 261\n")
    _, turned_down = all_pairs()
    for pair, sentence in turned_down.items():
        case = complete(dict(pair))
        settings = {key: value for name, level in case.items() for key, value in FEATURES[name][level].items()}
        texts = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]
        with pytest.raises(ConfigError) as error:
            load_config(tmp_path / "run.toml", texts)
        assert sentence in str(error.value)
        assert "set " in sentence
        assert sentence.count(". ") == 0


def test_a_section_may_refuse_too():
    (sentence,) = refused(replace(BASE, model=replace(BASE.model, num_kv_heads=4)))
    assert sentence.startswith("model.num_kv_heads: ")


def test_deepspeed_alone_is_refused_anything():
    """The aim is zero; what is refused is listed here, so that more of it needs a change here."""
    _, turned_down = all_pairs()
    kinds = {tuple(sorted(feature for feature, _ in pair)) for pair in turned_down}
    assert all(any("deepspeed" in level for _, level in pair) for pair in turned_down)
    assert kinds <= {("schedule", "zero"), ("pp", "zero"), ("optimizer", "zero")}


def test_a_sample_is_the_same_again_and_each_case_may_run():
    cases = sample(20, seed=3)
    assert cases == sample(20, seed=3) != sample(20, seed=4)
    assert all(map(is_case, cases))
    assert len({title(case) for case in cases}) == 20


def test_a_tensor_that_is_wrong_shows_among_many():
    import torch

    names = [f"gradient/0/{number}" for number in range(39)]
    oracle = {name: torch.full((5 + 1000 * (name == names[0]),), 2.0) for name in names}
    rounded = {name: tensor * 1.01 for name, tensor in oracle.items()}
    assert error_of(rounded, oracle, "first gradient") == pytest.approx(0.01, rel=1e-4)
    for name in names:
        wrong = rounded | {name: 2 * oracle[name]}
        assert error_of(wrong, oracle, "first gradient") > 10 * error_of(rounded, oracle, "first gradient")
    assert error_of(oracle | {names[3]: oracle[names[3]] * float("nan")}, oracle, "gradient") == float("inf")
    assert set(KINDS) >= {"loss", "gradient", "parameter"}


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder for what one process computes, which many cases compare with, on whatever worker they run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "matrix"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize("case", covering_set(), ids=title)
def test_a_case_computes_what_one_process_computes(shared, case):
    found = judge_on_ranks(case, num_ranks(case), shared)
    assert found["ok"], found["worst"] + f": {found['error']}"
