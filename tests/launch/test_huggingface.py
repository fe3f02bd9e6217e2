"""`import-hf`, `export-hf`, `model.weights` from the command line: what is refused, to the letter; and a whole way."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from armillary.launch import cli
from armillary.train.data.tokenizer import byte_tokenizer

transformers = pytest.importorskip("transformers")

TRAIN = """
[model]
dim = 16
num_layers = 2
num_heads = 2
ffn_dim = 24
vocab_size = 260
tie_embeddings = false
norm_eps = 1e-6
weights = "runs/base"
[data]
tokenizer = "runs/base"
cache = "cache"
sources = [{ path = "text" }]
sequence_length = 32
batch_size = 4
held_out = 0
[optim]
precision = "float32"
steps = 3
learning_rate = 1e-3
[plan]
dp = 2
[metrics]
wandb = "off"
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama in Hugging Face's format."""
    path = tmp_path_factory.mktemp("hugging") / "base"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save(path)
    return path


@pytest.fixture
def folder(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a copy of it, and a text."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "base")
    Path("text").mkdir()
    for number in range(8):
        Path(f"text/{number}.txt").write_text(f"{number} the quick brown fox " * 8)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["armillary", *arguments])
    return cli.run()


def config(**changes: Any) -> Callable[[], None]:
    """Changes keys of config.json; None removes one."""

    def act() -> None:
        path = Path("base/config.json")
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return act


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[], None]:
    def act() -> None:
        held = load_file("base/model.safetensors")
        change(held)
        save_file(held, "base/model.safetensors", {"format": "pt"})

    return act


def pickled() -> None:
    Path("base/model.safetensors").unlink()
    Path("base/pytorch_model.bin").write_bytes(b"\x80\x04.")


def index() -> None:
    Path("base/model.safetensors.index.json").write_text('{"weight_map": {"x": "../evil.safetensors"}}')


BASE = "base/config.json: "
K = "model.layers.1.self_attn.k_proj.weight"
CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "another architecture": (
        config(model_type="gpt2"),
        BASE + "model_type is 'gpt2'; models of llama, mistral, qwen2, qwen3 can be imported",
    ),
    "biases": (
        config(attention_bias=True),
        BASE + "attention_bias is True, which our models do not have; if it changes nothing in the result, remove it",
    ),
    "biases in the feed-forward": (
        config(mlp_bias=True),
        BASE + "mlp_bias is True, which our models do not have; if it changes nothing in the result, remove it",
    ),
    "experts": (
        config(num_local_experts=8),
        BASE + "num_local_experts is 8, which our models do not have; if it changes nothing in the result, remove it",
    ),
    "another activation": (config(hidden_act="gelu"), BASE + "hidden_act is 'gelu'; only 'silu' can be imported"),
    "part of a head turned": (
        config(partial_rotary_factor=0.5),
        BASE + "partial_rotary_factor is 0.5; only 1.0 can be imported",
    ),
    "another scaling": (
        config(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}),
        BASE + "rope_scaling is of the type 'yarn'; only 'llama3' and 'default' can be imported",
    ),
    "half a scaling": (
        config(rope_parameters={"rope_type": "llama3", "factor": 4.0, "rope_theta": 1e4}),
        BASE + "rope_scaling.low_freq_factor must be a number above 0; it is None",
    ),
    "a size left out": (
        config(hidden_size=None),
        BASE + "hidden_size must be a whole number above 0; it is None",
    ),
    "some layers with a window": (
        config(model_type="qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
        BASE
        + "use_sliding_window holds for 1 of 2 layers (layer_types, max_window_layers); our models have one window "
        "for all layers, or none",
    ),
    "heads that do not divide": (
        config(num_key_value_heads=3),
        BASE + "the model it describes is not one of ours: model.num_kv_heads must divide model.num_heads = 2",
    ),
    "a tensor missing": (
        tensors(lambda held: held.pop(K)),
        f"{BASE}the tensors lack '{K}', which a llama has",
    ),
    "a tensor too many": (
        tensors(lambda held: held.update(extra=torch.zeros(1))),
        BASE + "the tensors have 'extra', which a llama has not",
    ),
    "another shape": (
        tensors(lambda held: held.update({K: torch.zeros(16, 8)})),
        f"{BASE}'{K}' is (16, 8), but by the config it is (16, 16)",
    ),
    "a quantised tensor": (
        tensors(lambda held: held.update({K: torch.zeros(16, 16, dtype=torch.int8)})),
        f"base/model.safetensors: '{K}' is I8; F32, BF16, F16 can be imported, so take the weights before they were "
        "quantised",
    ),
    "a pickle": (
        pickled,
        "base/pytorch_model.bin: is a pickle, which may run code when it is read, so it is never opened; get the model "
        "as *.safetensors",
    ),
    "an index that leads out": (
        index,
        "base: '../evil.safetensors' is no name of a file inside it; it must be relative, without '..'",
    ),
    "no config": (
        lambda: Path("base/config.json").unlink(),
        "base/config.json: there is no such file; give a folder of Hugging Face's kind",
    ),
    "no tokenizer": (
        lambda: Path("base/tokenizer.json").unlink(),
        'import-hf PATH = "base": there is no file base/tokenizer.json; give "bpe:4096", "bytes", a tokenizer.json or '
        "a folder that holds one",
    ),
    "a vocabulary too small": (
        lambda: (config(vocab_size=100)(), tensors(_fewer_rows)()),
        "model.vocab_size: 100 is too small for data.tokenizer = '{cwd}/runs/base', which has 257 entries; set "
        "model.vocab_size = 257 or more",
    ),
}


def _fewer_rows(held: dict[str, torch.Tensor]) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        held[name] = held[name][:100].clone()


@pytest.mark.parametrize("case", list(CASES))
def test_what_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, case: str) -> None:
    spoil, message = CASES[case]
    spoil()
    assert run(monkeypatch, "import-hf", "base") == 2
    assert capsys.readouterr().err == f"error: {message.replace('{cwd}', str(folder))}\n"
    assert not Path("runs/base").exists()


def test_wrong_places(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for arguments, message in {
        ("import-hf", "bas"): "bas: there is no such folder or file; give a folder with config.json, or a GGUF file",
        ("import-hf", "text/0.txt"): "text/0.txt: is no GGUF file; give one, or the folder that holds config.json and "
        "*.safetensors",
        ("export-hf", "base", "out", "--dtype", "int8"): "--dtype int8: can be float32 or bfloat16",
    }.items():
        assert run(monkeypatch, *arguments) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    assert run(monkeypatch, "import-hf", "base") == 0
    capsys.readouterr()
    assert run(monkeypatch, "import-hf", "base") == 2
    assert capsys.readouterr().err == "error: runs/base exists; choose another --name\n"
    assert run(monkeypatch, "export-hf", "base", "base") == 2
    assert capsys.readouterr().err == "error: base: exists; name a folder that does not\n"


def test_import_train_resume_export_generate(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """The weights are where the losses begin; a run that has a checkpoint of its own never looks at them again."""
    assert run(monkeypatch, "import-hf", "base", "--json", "import.json") == 0
    assert json.loads(Path("import.json").read_text())["logits_error"] < 1e-5
    Path("train.toml").write_text(TRAIN)
    assert run(monkeypatch, "train", "train.toml", "--name", "tuned") == 0
    assert f"begins with the weights of {folder}/runs/base/checkpoints/step-00000000" in capfd.readouterr().out
    # What an imported model was trained on is not known, so it is evaluated on whatever its config names.
    Path("runs/base/config.toml").write_text(TRAIN.replace("held_out = 0\n", "held_out = 0.5\n"))
    assert run(monkeypatch, "evaluate", "base", "--json", "evaluation.json") == 0
    assert json.loads(Path("evaluation.json").read_text())["loss"] == pytest.approx(_losses("tuned")[0], abs=0.1)

    shutil.rmtree("runs/base/checkpoints")
    assert run(monkeypatch, "train", "--resume", "tuned", "--set", "optim.steps=5") == 0
    assert len(_losses("tuned")) == 5
    assert run(monkeypatch, "export-hf", "tuned", "out", "--json", "export.json") == 0
    assert json.loads(Path("export.json").read_text()) | {"logits_error": 0.0} == {
        "path": "out",
        "family": "llama",
        "step": 5,
        "logits_error": 0.0,
    }
    assert run(monkeypatch, "import-hf", "out", "--name", "again") == 0
    capfd.readouterr()
    texts = []
    for name in ("tuned", "again"):
        assert run(monkeypatch, "generate", name, "the ", "--tokens", "8", "--temperature", "0") == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1]


def _losses(name: str) -> list[float]:
    rows = [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]
