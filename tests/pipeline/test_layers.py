"""`--layers` and `--combination`: shown, part of the identity, refused when they differ."""

import re

import pytest

from pipeline.cli import main


@pytest.fixture
def store(folder, tmp_path, tiny, pipeline):
    """A store whose tokens are the mean of three blocks, and the command it was begun with."""
    arguments = ["encode", folder, "--out", tmp_path / "store", "--shards", 2, *tiny]
    arguments += ["--encoder", "vit_small_patch16_dinov3_qkvb", "--views", "center"]
    arguments += ["--encoder-args", "embed_dim=32,depth=4,num_heads=2"]
    code, _, err = pipeline(*arguments, "--layers", "1-3")
    assert code == 0, err
    return tmp_path / "store", arguments


def test_blocks_are_shown_kept_by_add_view_and_compared_when_a_store_is_continued(store, pipeline):
    path, arguments = store
    shown = "mean+spatial-mean of blocks 1 2 3, LayerNorm without affine, eps 1e-05"
    assert shown in pipeline("inspect", path)[1]
    assert pipeline("report", path)[0] == 0
    assert shown in path.with_name("store.html").read_text()
    for changed, difference in {
        ("--layers", "1,3"): r"encoder.aggregation.layers is \[1, 2, 3\], the other has \[1, 3\]",
        ("--layers", "1-3", "--combination", "mean"): "is 'mean.spatial-mean', the other has 'mean'",
        (): r"encoder.aggregation is .*'layers': \[1, 2, 3\].*, the other has None",
    }.items():
        code, _, err = pipeline(*arguments, *changed)
        assert code != 0
        assert re.search(difference, err), err
        assert err.count("\n") == 1
    code, _, err = pipeline("add-view", path, "--views", "flip")
    assert code == 0, err


@pytest.mark.parametrize(
    ("layers", "complaint"),
    [
        ("3,1", "--layers must name each block once, in ascending order, got 3,1; use 1,3"),
        ("1,1", "got 1,1; use 1"),
        ("3-1", "in ascending order, got 3-1; such as 11,13,15"),
        ("last", "--layers takes numbers of blocks counted from 0, got 'last'; such as 11,13,15 or 1-23"),
        ("-1", "got '-1'"),
        ("", "got ''"),
    ],
)
def test_what_names_no_blocks_is_refused_before_anything_is_read(layers, complaint, tmp_path, capsys):
    arguments = ["encode", str(tmp_path / "none"), "--out", str(tmp_path / "s"), "--shards", "1"]
    assert main([*arguments, f"--layers={layers}"]) == 2
    assert complaint in capsys.readouterr().err
