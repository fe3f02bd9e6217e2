"""A benchmark measures both sides on the same work, in turn, and says on what and with which command."""

import json

import pytest

from armillary.launch import cli
from armillary.launch.bench import attention_io
from armillary.launch.bench.attention_io import CASES, Case, parse_documents, parse_mask, text_of
from armillary.launch.bench.turns import interleaved
from armillary.launch.bench_gpu import ncu as attention_profile
from armillary.launch.rows import print_table


def test_turns_are_interleaved_and_the_warm_up_is_not_counted():
    order = []
    turns = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    seconds = interleaved(turns, 3)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_rows_and_facts(tmp_path, monkeypatch, capsys):
    row = {"name": "x", "seconds": 0.5, "ratio": 1.0, "bytes": 0, "measured": True, "note": "n"}
    monkeypatch.setattr("armillary.launch.bench.train.rows", lambda repetitions: [row] * repetitions)
    assert armillary(monkeypatch, "train", "--repetitions", "2", "--json", str(tmp_path / "it.json")) == 0
    result = json.loads((tmp_path / "it.json").read_text())
    assert len(result["rows"]) == 2
    assert {"commit", "command", "versions", "platform"} <= result.keys()
    assert capsys.readouterr().out.count("500.00 ms") == 2


def test_a_benchmark_that_there_is_not(monkeypatch, capsys):
    assert armillary(monkeypatch, "trian") == 2
    assert "bench trian: there is no such benchmark; there are: attention, compose," in capsys.readouterr().err


def test_a_table_aligns_numbers_to_the_right(capsys):
    print_table([["name", "size"], ["a", "10"], ["long name", ""], ["b", "9.5"]])
    assert capsys.readouterr().out.splitlines() == [
        "name       size",
        "a            10",
        "long name",
        "b           9.5",
    ]


def armillary(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["armillary", "bench", *arguments])
    return cli.run()


def test_io_of_one_case_to_a_file(tmp_path, monkeypatch, capsys):
    file = tmp_path / "io.json"
    options = ["--io", "--head-dim", "64", "--heads", "6", "--kv-heads", "2", "--documents", "100,300,112"]
    assert armillary(monkeypatch, "attention", *options, "--mask", "causal,window=64", "--json", str(file)) == 0
    printed = capsys.readouterr().out
    assert "512 tokens, 3 documents, 6 heads, 2 key heads, head_dim 64, causal,window=64:" in printed
    rows = json.loads(file.read_text())["rows"]
    assert [row["kernel"] for row in rows] == ["forward", "delta", "key_gradient", "query_gradient"]
    for row in rows:
        assert {"name", "seconds", "ratio", "bytes"} <= row.keys()
        assert row["simulated"]
        assert row["bytes"] >= row["compulsory_bytes"] > 0
        assert f"{row['bytes'] / 2**20:.1f}" in printed


def test_io_of_the_worked_example(capsys):
    rows = attention_io.print_io([Case((8192,), parse_mask("full"), 1, 1, 128)])
    forward = rows[0]
    queries, keys = forward["tile"]
    assert forward["bytes"] == 4 * 8192 * 128 + 4 * 8192 + 4 * 8192 * 128 * 8192 // queries
    assert forward["tiles"] == forward["all_tiles"] == 8192 * 8192 // (queries * keys)
    assert f"{forward['rho_lb']:.1f}" in capsys.readouterr().out


def test_io_of_the_shipped_set_prints_each_case(monkeypatch, capsys):
    assert armillary(monkeypatch, "attention", "--io") == 0
    printed = capsys.readouterr().out
    assert all(f"{case.name}:" in printed for case in CASES)


def test_choices(tmp_path, monkeypatch, capsys):
    from armillary.kernels.attention.choice import CHOICES

    file = tmp_path / "choices.json"
    assert armillary(monkeypatch, "attention", "--choices", "--json", str(file)) == 0
    printed = capsys.readouterr().out
    assert [row["why"] for row in json.loads(file.read_text())["rows"]] == [choice.why for choice in CHOICES]
    assert all(choice.where in printed for choice in CHOICES)


@pytest.mark.parametrize(
    "text", ["causal", "full", "full,window=8", "causal,window=4096,sinks=64,block=64,stride=8,shift=1"]
)
def test_masks_are_read_as_they_are_written(text):
    assert text_of(parse_mask(text)) == text


def test_documents_from_a_list_and_a_file(tmp_path):
    file = tmp_path / "lengths"
    file.write_text("3\n40 5,\n6\n")
    assert parse_documents("3, 40,5", None) == (3, 40, 5)
    assert parse_documents(str(file), 54) == (3, 40, 5, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seq", "5"], "describe what --io meters; add --io"),
        (["--io", "--choices"], "either --io or --choices"),
        (["--io", "--mask", "casual"], "--mask: 'casual'; allowed are causal or full, and window=N, sinks=N"),
        (["--io", "--mask", "causal,window=-3"], "--mask: 'window=-3'; allowed"),
        (["--io", "--mask", "window=6,block=4"], "window 6 and sinks 0 must be multiples of block 4"),
        (["--io", "--documents", "3,0"], "--documents 3,0: give lengths of 1 or more"),
        (["--io", "--documents", "nowhere"], "No such file or directory"),
        (["--io", "--documents", "3,4", "--seq", "8"], "their lengths sum to 7, but --seq is 8"),
        (["--io", "--heads", "6", "--kv-heads", "4"], "--heads 6 is not a multiple of --kv-heads 4"),
        (["--io", "--head-dim", "300"], "--head-dim 300: the kernels, and so the table of block sizes, end at 256"),
    ],
)
def test_what_is_refused(options, message, monkeypatch, capsys):
    assert armillary(monkeypatch, "attention", *options) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_measuring_is_refused_without_a_gpu_or_its_profiler(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("PATH", "")
    assert armillary(monkeypatch, "attention", "--io", "--measure") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "error: bench attention --io --measure: measuring needs an NVIDIA GPU and the command ncu of NVIDIA Nsight "
        "Compute, not found here; leave --measure out for the meter alone\n"
    )


NCU = """#!/bin/sh
echo "$@" >> "$0.log"
cat <<'END'
==PROF== Connected to process 1
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","forward_kernel","dram__bytes.sum","byte","84,934,656"
"0","forward_kernel","lts__t_bytes.sum","byte","4362090496.0"
END
"""


def test_what_ncu_counts_stands_beside_the_meter(tmp_path, monkeypatch, capsys):
    """With a stand-in for ncu that answers as it does."""
    stand_in = tmp_path / "ncu"
    stand_in.write_text(NCU)
    stand_in.chmod(0o755)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.version.hip", None)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    rows = attention_io.print_io([CASES[0]], measure=True)
    assert rows[0]["measured_dram_bytes"] == 84934656
    assert rows[0]["measured_l2_bytes"] == 4362090496
    assert "measured_dram_bytes" not in rows[1]
    assert " 81.0 " in capsys.readouterr().out
    calls = (tmp_path / "ncu.log").read_text().splitlines()
    asked = ["forward", "key_gradient", "query_gradient"]
    assert [call.split("regex:^")[1].split("_kernel")[0] for call in calls] == asked
    assert all("--metrics dram__bytes.sum,lts__t_bytes.sum" in call and "bench_gpu.ncu" in call for call in calls)


def test_an_ncu_that_may_not_count_is_told(tmp_path, monkeypatch):
    stand_in = tmp_path / "ncu"
    stand_in.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM'\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ValueError, match="ncu counted nothing: ==ERROR== ERR_NVGPUCTRPERM"):
        attention_profile.measured_bytes(CASES[0], "forward")


def test_the_profiled_process_is_given_the_same_case(monkeypatch):
    seen = []
    monkeypatch.setattr(attention_profile, "run_once", lambda kernel, case: seen.append((kernel, case)))
    for case in CASES:
        attention_profile.main("forward", json.dumps(attention_profile.asdict(case)))
    assert seen == [("forward", case) for case in CASES]


@pytest.mark.parametrize("kernel", ["forward", "key_gradient"])
def test_the_profiled_process_runs_attention(kernel):
    """On the CPU with another implementation: the call is the same."""
    attention_profile.run_once(kernel, Case((5, 3), parse_mask("causal"), 2, 1, 8), "cpu", "reference")
