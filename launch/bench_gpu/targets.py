"""What attention shall reach on an H100: TFLOP/s, bfloat16, 8192 tokens a row."""

LENGTH = 8192
TARGETS = {
    ("forward", 128, "full"): 520,
    ("forward", 128, "causal"): 450,
    ("backward", 128, "full"): 340,
    ("backward", 128, "causal"): 340,
    ("forward", 64, "full"): 390,
    ("forward", 64, "causal"): 360,
    ("backward", 64, "full"): 270,
    ("backward", 64, "causal"): 270,
}
