"""A benchmark measures both sides on the same work, in turn, and says on what and with which command."""

from armillary.launch import bench


def test_turns_are_interleaved_and_the_warm_up_is_not_counted():
    order = []
    turns = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    seconds = bench.interleaved(turns, 3)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_rows_and_facts(monkeypatch, capsys):
    def one_row(repetitions):
        return [{"name": "x", "seconds": 0.5, "ratio": 1.0, "bytes": 0, "measured": True, "note": "n"}] * repetitions

    monkeypatch.setattr(bench, "bench_train", one_row)
    result = bench.run_benchmark("train", 2)
    assert len(result["rows"]) == 2
    assert {"commit", "command", "versions", "platform"} <= result.keys()
    assert capsys.readouterr().out.count("500.0 ms") == 2
