"""Files are whole or not there, and a name that was read from a file leads nowhere else."""

import errno
import json
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.train.config.run_config import RunConfig
from armillary.train.data.tokenizer import byte_tokenizer
from armillary.train.files import safe_join, write_aside, write_json
from armillary.train.run_folder import create_run


def test_write_aside_replaces_a_file(tmp_path):
    write_aside(tmp_path / "a", b"old")
    write_aside(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_aside_that_fails_leaves_the_old_content_alone(tmp_path, monkeypatch, call):
    write_aside(tmp_path / "a", b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'"):
        write_aside(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_write_json_refuses_what_json_cannot_hold(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, None]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", float("nan"))


def test_safe_join_takes_plain_names(tmp_path):
    assert safe_join(tmp_path, "rank-00000.safetensors") == tmp_path / "rank-00000.safetensors"
    assert safe_join(tmp_path, "a/b..c") == tmp_path / "a" / "b..c"


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "..", "a/../../b", "./a", "a//b", "a\\..\\b", "C:/x", "a\0b", "a/"]
)
def test_safe_join_refuses_escapes(tmp_path, name):
    with pytest.raises(ValueError):
        safe_join(tmp_path, name)


def test_safe_join_refuses_links_that_lead_out(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "out").symlink_to(tmp_path)
    (inside / "file").symlink_to("/etc/passwd")
    (inside / "good").symlink_to(inside)
    for name in ("out/x", "out", "file"):
        with pytest.raises(ValueError, match="link"):
            safe_join(inside, name)
    assert safe_join(inside, "good/x") == inside / "good/x"


@given(st.lists(st.sampled_from(["..", ".", "", "a", "b", "/", "~", "C:", "\0"]), max_size=6).map("/".join))
def test_safe_join_never_leaves_the_folder(tmp_path_factory, name):
    folder = tmp_path_factory.getbasetemp()
    try:
        path = safe_join(folder, name)
    except ValueError:
        return
    assert path.resolve().is_relative_to(folder.resolve())
    assert path != folder


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("tiny.toml", "tiny"),
        ("c \u00fc'x.toml", "c-x"),
        ("50%d.toml", "50-d"),
        ("\u00fc.toml", "run"),
        ("_a.toml", "a"),
    ],
)
def test_a_run_without_a_name_gets_one_that_a_shell_takes_as_it_is(tmp_path, monkeypatch, config, name):
    monkeypatch.chdir(tmp_path)
    run = create_run(RunConfig(), config, "", byte_tokenizer())
    assert re.fullmatch(rf"runs/{name}-\d{{8}}-\d{{6}}", str(run.path))
