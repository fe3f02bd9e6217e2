"""The strategies of context parallelism beside each other: rows of every one, and their bytes as the formulas say."""

import json

import pytest
import torch
import torch.distributed as dist

from armillary.comm.ledger import Ledger
from armillary.kernels.attention.call import CAUSAL
from armillary.launch import cli
from armillary.launch.bench import context as bench_context
from armillary.launch.bench.context_rank import PASSES, WAYS, Case, Work
from armillary.launch.bench.context_rows import rows_of
from armillary.launch.bench.context_ways import Tiles, Watched, repeat
from armillary.launch.lab.permission import why_not
from armillary.parallel.context.bytes import bytes_sent
from armillary.parallel.context.core import STRATEGIES
from armillary.parallel.context.layout import lay_out

NO_LAB = why_not()


def armillary(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["armillary", "bench", "context", *arguments])
    return cli.run()


def bytes_by_formula(row, num_ranks, tokens):
    shards = lay_out(torch.arange(num_ranks * tokens)[None].numpy(), None, num_ranks).shards()
    heads, kv_heads = row["heads"]
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": 64, "dtype": torch.bfloat16, "level": row["level"]}
    strategy, backward = row.get("choice", row["strategy"]), row["pass"] == "backward"
    return bytes_sent(strategy, backward, shards, CAUSAL, **sizes)


def check_rows(rows, cases, strategies, num_ranks, tokens):
    for case in cases:
        for name in PASSES:
            found = {row["strategy"]: row for row in rows if row["pass"] == name and row["heads"] == list(case)}
            assert set(strategies) <= set(found) <= {*strategies, "auto"}
            assert found["all_gather"]["ratio"] == 1
            for row in found.values():
                assert row["measured"]
                assert row["bytes_by_rank"] == bytes_by_formula(row, num_ranks, tokens)
                assert row["bytes"] == sum(row["bytes_by_rank"])
                assert row["seconds"] > 0
                assert row["ratio"] == pytest.approx(found["all_gather"]["seconds"] / row["seconds"])
                assert 0 <= row["hidden"] <= 1
    refused = [row for row in rows if row["strategy"] == "torch"]
    assert len(refused) == len(cases)
    assert all("does not have a sharding strategy" in row["note"] and row["seconds"] is None for row in refused)


def test_two_ranks_on_this_machine(tmp_path, monkeypatch, capfd):
    """A run of every strategy; the ranks themselves hold the ledger's bytes against the formulas."""
    file = tmp_path / "it.json"
    assert armillary(monkeypatch, "--ranks", "2", "--tokens", "24", "--repetitions", "1", "--json", str(file)) == 0
    captured = capfd.readouterr()
    result = json.loads(file.read_text())
    check_rows(result["rows"], [(8, 8), (8, 1)], STRATEGIES, 2, 24)
    assert {"commit", "command", "versions", "load"} <= result.keys()
    assert "8:8 backward token_ring" in captured.out
    assert "torch's context_parallel: refused: NotImplementedError" in captured.out
    assert "8 heads, 1 key heads: repetition 1 of 1" in captured.err


@pytest.mark.lab
@pytest.mark.skipif(bool(NO_LAB), reason=str(NO_LAB))
def test_in_a_lab(tmp_path, monkeypatch, capsys):
    file = tmp_path / "it.json"
    options = ["--lab", "mesh", "--hosts", "2", "--rate", "100mbit", "--strategies", "ring,token_ring"]
    sizes = ["--heads", "2:2", "--tokens", "32", "--repetitions", "1"]
    assert armillary(monkeypatch, *options, *sizes, "--json", str(file)) == 0
    result = json.loads(file.read_text())
    check_rows(result["rows"], [(2, 2)], ["ring", "token_ring", "all_gather"], 2, 32)
    (link,) = result["lab"]["links"]
    per_repetition = sum(row["bytes_by_rank"][0] for row in result["rows"] if row["strategy"] in STRATEGIES)
    # Together, the wire alone, and once to note the transfers.
    assert link["sent"] > 3 * per_repetition
    assert "host0-host1" in capsys.readouterr().out


def test_a_lab_that_is_not_permitted_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(bench_context, "why_not", lambda spec: "a lab needs root")
    assert armillary(monkeypatch, "--lab", "star") == 2
    assert capsys.readouterr().err == "error: a lab needs root\n"


def ways_apart(rank: int) -> list[int]:
    """Bytes that the ledger shows for tiles alone, together, and together with the transfers once more."""
    case = Case(Work(2, 8, ((4, 2),), ("ring", "ulysses"), 1), (4, 2), dist.group.WORLD)
    found = []
    for name in case.work.strategies:
        ledger = Ledger()
        case.both(name, [case.call("x", Tiles, ledger)] * 2)
        found.append(ledger.bytes())
        watched = case.call("x", Watched, ledger)
        case.both(name, [watched, watched])
        found.append(ledger.bytes())
        repeat(watched.events)
        found.append(ledger.bytes())
    return found


def test_tiles_send_nothing_and_the_wire_sends_all_again(world):
    for alone, once, twice, *others in world(ways_apart, 2):
        assert alone == others[0] == 0
        assert twice == 2 * once > 0
        assert others[2] == 2 * others[1] > 0


def made_up(together, tiles, wire):
    """Figures of one rank: pairs (forward, backward), a list a repetition."""
    seconds = dict(zip(WAYS, (together, tiles, wire), strict=True))
    return {
        "seconds": [{"all_gather": seconds}],
        "bytes": [{"all_gather": [1000, 2000]}],
        "level": 2,
        "torch": [""],
        "link": {"rate": 1e6, "latency": 0.0, "own_links": False},
    }


def test_a_repetition_takes_what_its_slowest_rank_takes_and_the_rest_is_hidden():
    work = Work(2, 8, ((2, 2),), ("all_gather",), 3)
    first = made_up([(5, 9), (9, 9), (7, 9)], [(4, 8)] * 3, [(2, 4)] * 3)
    second = made_up([(6, 9), (3, 9), (8, 9)], [(5, 9)] * 3, [(4, 4)] * 3)
    forward, backward, *rest = rows_of(work, [first, second])
    assert (forward["seconds"], forward["tile_seconds"], forward["wire_seconds"]) == (8, 5, 4)
    assert (forward["exposed_seconds"], forward["hidden"], forward["bytes"]) == (3, 0.25, 2000)
    assert (backward["exposed_seconds"], backward["hidden"]) == (0, 1)
    assert rest[-1]["note"] == "runs here, and was not timed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--regime", "mixed"], "--regime mixed: allowed are communication, compute"),
        (["--rate", "5mbit"], "--rate 5mbit: describes a lab; add --lab star, mesh or ring"),
        (["--lab", "star", "--ranks", "3"], "--ranks 3: in a lab each host is a rank; give --hosts"),
        (["--ranks", "1"], "one rank has nobody to exchange with"),
        (["--lab", "cube"], "--lab cube: allowed are star, ring, mesh"),
        (["--heads", "8:3"], "--heads 8:3: write query heads and key heads that divide them, for example 8:8,8:1"),
        (["--heads", "0:1"], "--heads 0:1: write"),
        (["--strategies", "ring,spiral"], "--strategies spiral: there is no such strategy; there are ring,"),
    ],
)
def test_what_is_refused(options, message, monkeypatch, capsys):
    assert armillary(monkeypatch, *options) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
