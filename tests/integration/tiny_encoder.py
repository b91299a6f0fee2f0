"""The smallest encoder, as arguments of `pipeline`."""

TINY_ENCODER = [
    "--encoder",
    "test_vit",
    "--weights",
    "random:0",
    "--input-size",
    "32",
    "--encoder-args",
    "depth=1",
]
"""2×2 tokens of 64 from crops of 32 pixels."""
