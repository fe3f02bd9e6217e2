"""The denominator of MFU: published, measured or left out, never guessed."""

import subprocess
import sys
import time

import pytest
import torch

from armillary.train.observe.peak import PUBLISHED, measured_cpu_flops, peak_flops, peak_memory_gib


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100 80GB PCIe", torch.float16, 312),
        ("NVIDIA A100-SXM4-40GB", torch.float32, 19.5),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H100 NVL", "bfloat16", 835),
        ("NVIDIA H200", "bfloat16", 989),
        ("NVIDIA H200 NVL", "bfloat16", 835),
        ("NVIDIA GH200 480GB", "bfloat16", 989),
        ("NVIDIA B200", "bfloat16", 2250),
        ("NVIDIA GB200", "bfloat16", 2500),
        ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA L40", "bfloat16", 181),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA A10", "bfloat16", 125),
        ("NVIDIA A10G", "bfloat16", 70),
        ("Tesla T4", "float16", 65),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("Tesla V100-PCIE-16GB", "float16", 112),
        ("Tesla V100S-PCIE-32GB", "float16", 130),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("AMD Instinct MI300X", "bfloat16", 1307),
    ],
)
def test_published_peaks(name: str, dtype: object, tera: float) -> None:
    flops, origin = peak_flops("cuda", name, dtype)
    assert flops == pytest.approx(tera * 1e12)
    assert name in origin
    assert "published" in origin


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA X9000", "bfloat16"),
        ("", "bfloat16"),
        ("NVIDIA H100", "bfloat16"),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"),
        ("Tesla T4", "bfloat16"),
        ("NVIDIA H100 80GB HBM3", "float64"),
        ("NVIDIA T400 4GB", "float16"),
    ],
)
def test_unknown_devices_have_no_peak_rather_than_a_guess(name: str, dtype: str) -> None:
    flops, origin = peak_flops("cuda", name, dtype)
    assert flops is None
    assert name in origin


def test_other_devices_have_no_peak() -> None:
    assert peak_flops("mps", "Apple M3", "float32")[0] is None


def test_patterns_are_lower_case_as_the_names_they_meet() -> None:
    assert all(pattern.replace(r"\S", "").lower() == pattern for pattern, _ in PUBLISHED)


@pytest.mark.parametrize("dtype", ["float32", torch.bfloat16])
def test_cpu_is_measured_in_the_dtype(dtype: object) -> None:
    flops, origin = peak_flops("cpu", "cpu", dtype)
    assert flops is not None
    assert 1e8 < flops < 1e15
    assert "measured" in origin
    assert str(dtype).removeprefix("torch.") in origin


def test_measured_rate_is_that_of_real_products() -> None:
    """In one of several attempts: on a busy machine each of the two may be disturbed."""
    size = 512
    matrix = torch.ones(size, size)

    def ratio() -> float:
        matrix @ matrix
        start = time.perf_counter()
        for _ in range(20):
            matrix @ matrix
        rate = 20 * 2 * size**3 / (time.perf_counter() - start)
        return measured_cpu_flops("float32") / rate

    assert any(0.6 < ratio() < 1.7 for _ in range(20))


def test_memory_of_this_process_grows_with_what_it_takes() -> None:
    code = (
        "from armillary.train.observe.peak import peak_memory_gib as peak\n"
        "before = peak('cpu'); block = bytearray(b'x') * (256 << 20); print(before, peak('cpu'))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after = map(float, output.split())
    assert 0.001 < before < 1
    assert after - before == pytest.approx(0.25, abs=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_the_gpu_is_what_torch_allocated() -> None:
    torch.cuda.reset_peak_memory_stats()
    block = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    assert peak_memory_gib("cuda") == pytest.approx(torch.cuda.max_memory_allocated() / 2**30)
    assert peak_memory_gib("cuda") >= block.numel() / 2**30
