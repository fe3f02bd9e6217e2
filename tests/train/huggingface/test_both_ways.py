"""Models of every family, both ways: transformers' random weights in, the same logits; out again, the same bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from armillary.train.checkpoint.load import read_full
from armillary.train.config.run_config import load_config
from armillary.train.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from armillary.train.huggingface import import_model, weights
from armillary.train.huggingface.check import LogitsDiffer
from armillary.train.huggingface.export_model import export_hf
from armillary.train.huggingface.import_model import import_hf
from armillary.train.initial_weights import shapes_of
from armillary.train.model.transformer import Transformer
from armillary.train.run_folder import RunFolder

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 1000.0}, "tie_word_embeddings": False}),
    "smollm2": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama multi-head": ("llama", {"num_key_value_heads": 4, "head_dim": 12}),
    "qwen2": ("qwen2", {"num_key_value_heads": 1, **WINDOW, "max_window_layers": SIZES["num_hidden_layers"]}),
    "qwen2 tied, window": ("qwen2", {"tie_word_embeddings": True, **WINDOW}),
    "qwen3": ("qwen3", {"head_dim": 20}),
    "qwen3 tied, window": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True, **WINDOW}),
    "mistral": ("mistral", {"sliding_window": 9}),
    "mistral one": ("mistral", {"sliding_window": 1, "head_dim": 10}),
    "mistral no window": ("mistral", {"sliding_window": None}),
}
ODD = "Straße\u00a0→ 日本語 🙂👩‍👩‍👧 e\u0301 \t\r\n\n  x<|end|> 12345 ½ \u0000 \u200b don't"


def theirs(case: str, seed: int = 0) -> Any:
    """A tiny random model of transformers, every parameter of it random."""
    kind, changes = CASES[case]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **(SIZES | changes)), dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape)) if parameter.dim() == 1 else parameter.mul_(10)
            assert parameter.std() > 0.05, name
    return model


def write(folder: Path, case: str = "llama3", tokenizer: Tokenizer | None = None, **options: Any) -> Any:
    """Such a model in a folder, as transformers saves it, with a tokenizer of ours."""
    model = theirs(case)
    model.save_pretrained(folder, **options)
    (tokenizer or byte_tokenizer()).save(folder)
    return model


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stored(run: str) -> dict[str, torch.Tensor]:
    folder = RunFolder(Path(run))
    return {
        name: read_full(folder.checkpoints / "step-00000000", f"model/{name}")
        for name in shapes_of(folder.load_config().model)
    }


def quiet(line: str) -> None:
    pass


@torch.no_grad()
def logits(run: str, tokens: torch.Tensor) -> torch.Tensor:
    model = Transformer(RunFolder(Path(run)).load_config().model)
    model.load_state_dict(stored(run))
    return model(tokens)


@pytest.mark.parametrize("case", list(CASES))
def test_there_and_back(here: Path, case: str) -> None:
    original = write(here / "model", case).eval()
    result = import_hf("model", report=quiet)
    assert result["run"] == "runs/model"
    assert result["logits_error"] < 1e-5
    tokens = torch.randint(0, 300, (2, 40))
    with torch.no_grad():
        expected = original(tokens).logits
    assert expected.abs().max() > 1
    assert (logits("runs/model", tokens) - expected).abs().max() < 1e-4

    exported = export_hf("model", "out", report=quiet)
    assert exported["logits_error"] < 1e-5
    same = {"mistral no window": "llama"}.get(case, CASES[case][0])
    assert exported["family"] == same
    again = transformers.AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32).eval()
    if same == CASES[case][0]:
        assert type(again) is type(original)
        assert again.state_dict().keys() == original.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, expected)
    before, after = load_file("model/model.safetensors"), load_file("out/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before), "bit for bit"
    readable = Path("runs/model/config.toml").stat().st_mode
    written = [*Path("out").iterdir(), *Path("runs/model/checkpoints/step-00000000").iterdir()]
    assert {path.stat().st_mode for path in written} == {readable}, "by all whom the user lets"
    import_hf("out", "again", report=quiet)
    assert load_config("runs/again/config.toml").model == load_config("runs/model/config.toml").model


def test_sharded_files_and_bfloat16(here: Path) -> None:
    original = write(here / "model", max_shard_size="60KB")
    assert len(list((here / "model").glob("*.safetensors"))) > 2
    import_hf("model", report=quiet)
    assert torch.equal(stored("runs/model")["output.weight"], original.lm_head.weight)
    result = export_hf("model", "out", dtype="bfloat16", shard_bytes=20_000, report=quiet)
    assert result["logits_error"] < 1e-5
    index = json.loads((here / "out/model.safetensors.index.json").read_text())
    held: dict[str, str] = {}
    for file in (here / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            held |= {name: (file.name, opened.get_slice(name).get_dtype()) for name in opened.keys()}  # noqa: SIM118
    assert {name: file for name, (file, _) in held.items()} == index["weight_map"]
    assert {dtype for _, dtype in held.values()} == {"BF16"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained("out", dtype=torch.bfloat16)
    assert torch.equal(loaded.lm_head.weight, original.lm_head.weight.bfloat16())
    import_hf("out", "narrow", report=quiet)
    assert torch.equal(stored("runs/narrow")["output.weight"], original.lm_head.weight.bfloat16().float())


def test_half_precision_files(here: Path) -> None:
    model = theirs("qwen2").half()
    model.save_pretrained("model")
    byte_tokenizer().save("model")
    assert import_hf("model", report=quiet)["logits_error"] < 1e-5
    assert torch.equal(stored("runs/model")["norm.weight"], model.model.norm.weight.float())


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_tokenizer_is_that_of_transformers(here: Path, kind: str) -> None:
    text = "for name in names: print(name, 12)\n" * 40
    write(here / "model", tokenizer=byte_tokenizer() if kind == "bytes" else train_bpe([text], 290))
    import_hf("model", report=quiet)
    export_hf("model", "out", report=quiet)
    ours = load_tokenizer("runs/model")
    loaded = transformers.AutoTokenizer.from_pretrained("out")
    assert loaded.eos_token_id == ours.end_of_document
    for text in (ODD.replace("<|end|>", ""), "  for name\tin\n", ""):
        ids = ours.encode(text)
        assert loaded(text, add_special_tokens=False)["input_ids"] == ids
        assert loaded.decode(ids) == ours.decode(ids) == text
    assert load_tokenizer("out").encode(ODD) == ours.encode(ODD)


def test_transformers_generates_from_an_export(here: Path) -> None:
    write(here / "model")
    import_hf("model", report=quiet)
    export_hf("model", "out", report=quiet)
    model = transformers.AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32)
    prompt = torch.tensor([byte_tokenizer().encode("abc")])
    written = model.generate(prompt, max_new_tokens=8, do_sample=False)[0].tolist()
    expected = prompt[0].tolist()
    while len(expected) < 11 and expected[-1] != 256:
        expected.append(int(logits("runs/model", torch.tensor([expected]))[0, -1].argmax()))
    assert written == expected


def test_a_failed_check_leaves_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(here / "model")
    import_hf("model", report=quiet)
    real = import_model.read_full

    def wrong(folder: Path, name: str) -> torch.Tensor:
        return real(folder, name) * (1.01 if name.endswith("2.attention.value.weight") else 1)

    monkeypatch.setattr(import_model, "read_full", wrong)
    with pytest.raises(LogitsDiffer, match=r"more than 0\.0001; the run was not made") as caught:
        import_hf("model", "second", report=quiet)
    assert caught.value.result["logits_error"] > 1e-4
    monkeypatch.setattr(weights, "their_name", lambda name, real=weights.their_name: real(swapped(name)))
    with pytest.raises(LogitsDiffer, match="out was not written"):
        export_hf("model", "out", report=quiet)
    assert sorted(path.name for path in here.iterdir()) == ["model", "runs"]
    assert [path.name for path in (here / "runs").iterdir()] == ["model"]


def swapped(name: str) -> str:
    """Keys for values of the first layer."""
    parts = {"blocks.0.attention.key.weight": "blocks.0.attention.value.weight"}
    return (parts | {value: key for key, value in parts.items()}).get(name, name)


def test_a_tied_head_that_is_there_too(here: Path) -> None:
    write(here / "model", "smollm2")
    file = here / "model/model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    assert import_hf("model", report=quiet)["logits_error"] < 1e-5
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        import_hf("model", "other", report=quiet)
