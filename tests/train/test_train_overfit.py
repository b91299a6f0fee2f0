"""A network at least as wide as its tokens can learn one image by heart; a narrower one cannot (arXiv 2510.11690)."""

from __future__ import annotations

import torch

from train.models.normalizer import LatentNormalizer
from train.report.metrics_file import read_metrics
from train.weights.published import save_statistics

TOKEN_WIDTH = 32


def test_one_image_is_learnt_by_heart_only_by_a_network_as_wide_as_its_tokens(tmp_path, make_store):
    from train.dit import main

    make_store(tmp_path / "store", num_images=1, num_shards=1, width=TOKEN_WIDTH)
    # The variance of a single image is zero; its tokens are normal already.
    save_statistics(LatentNormalizer(None, torch.ones(TOKEN_WIDTH, 4, 4)), tmp_path / "stat.pt")
    final = {}
    for width in (TOKEN_WIDTH // 2, 3 * TOKEN_WIDTH // 2):
        out = tmp_path / str(width)
        main(
            f"dit-tiny --store {tmp_path}/store --out {out} --statistics {tmp_path}/stat.pt --views center"
            f" --model.width {width} --model.depth 3 --model.num-heads 2 --flow.label-dropout 0"
            " --flow.shift-base 512 --global-batch-size 32 --max-steps 250 --log-every 50 --tracker none"
            " --optimizer.lr 3e-3".split()
        )
        final[width] = read_metrics(out / "metrics.jsonl")[-1]["loss"]
    narrow, wide = final.values()
    # Noise has as many directions as the tokens are wide; the half that a network half as wide cannot carry stays.
    assert narrow > (TOKEN_WIDTH - TOKEN_WIDTH // 2) / TOKEN_WIDTH
    assert wide < 0.15
