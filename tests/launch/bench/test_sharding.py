"""The contenders of `bench sharding` do the same work, and its rows say who needs how long for it."""

import pytest

from armillary.launch.bench.sharding import OURS, measure, rows_of


def test_a_round_is_as_long_as_its_slowest_rank():
    ranks = [
        {"seconds": {OURS: [1.0, 2.0, 9.0], "other": [3.0, 3.0, 3.0]}, "bytes": {OURS: 8, "other": 0}},
        {"seconds": {OURS: [1.5, 1.0, 1.0], "other": [3.0, 4.0, 5.0]}, "bytes": {OURS: 9, "other": 0}},
    ]
    losses = {OURS: 7.0, "other": 7.0}
    ours, other = rows_of(2, [rank | {"losses": losses} for rank in ranks])
    assert (ours["seconds"], ours["ratio"], ours["bytes"]) == (2.0, 1.0, 8)
    assert (other["seconds"], other["ratio"]) == (4.0, 2.0)
    assert other["all_seconds"] == [3.0, 4.0, 5.0]


@pytest.mark.slow
def test_all_come_to_the_same_losses(capsys):
    rows = measure(1, "2", steps=1)["rows"]
    assert len(rows) == 5
    assert [row["loss"] for row in rows] == [pytest.approx(rows[0]["loss"], rel=1e-5)] * 5
    assert all(row["seconds"] > 0 and row["measured"] for row in rows)
    assert rows[0]["bytes"] > 1e6
    assert "bare FSDP2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": "1"}, '--ranks 1: write numbers of processes, 2 or more: "2,4"'),
        ({"ranks": "2,x"}, '--ranks 2,x: write numbers of processes, 2 or more: "2,4"'),
        ({"precision": "float16"}, "--precision float16: allowed are float32 and bfloat16"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError) as raised:
        measure(1, **options)
    assert str(raised.value) == message
