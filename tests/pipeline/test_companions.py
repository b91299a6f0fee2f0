"""`--also` and `--class-token`: several combinations of blocks and the class token from one pass over the network."""

import numpy as np
import pytest
import torch
from timm.layers import PatchEmbed
from torch.nn.modules.module import register_module_forward_hook

from pipeline.encoders.encoder import create_encoder
from shards import open_store
from shards.reading.dataset import SampleDataset
from shards.reading.loader import Loader

ARGUMENTS = ["--encoder", "vit_small_patch16_dinov3_qkvb", "--weights", "random:0", "--input-size", "32"]
ARGUMENTS += ["--encoder-args", "embed_dim=32,depth=4,num_heads=2"]
SIZE = {"input_size": 32, "model_args": {"embed_dim": 32, "depth": 4, "num_heads": 2}}


def rows_of(store, view, field):
    reader = store.reader(view, field)
    out = np.empty((len(store.valid_rows), *reader.row_shape), reader.dtype)
    reader.read(store.valid_rows, out)
    return out


@pytest.fixture
def passes():
    """Counts images that go through the network."""
    seen = []

    def count(module, inputs, output):
        if isinstance(module, PatchEmbed):
            seen.append(len(inputs[0]))

    hook = register_module_forward_hook(count)
    yield seen
    hook.remove()


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_companions_are_stores_of_the_same_rows_from_one_pass(folder, tmp_path, pipeline, passes, form):
    (folder / "class 1" / "broken.jpg").write_bytes(b"this is text")
    arguments = ["encode", folder, "--out", tmp_path / "store", "--shards", 3, *ARGUMENTS]
    arguments += ["--layers", "1,3", "--class-token", "--format", form]
    arguments += ["--also", "k1=3", "k4=0-3:mean"]
    if form == "zarr":
        code, out, err = pipeline(*arguments, "--dry-run")
        assert code == 0, err
        # 2 views of 4 tokens and a class token of 32 in float16, three times; images of one view.
        needed = 22 * (3 * 2 * (4 + 1) * 32 * 2 + 32 * 32 * 3)
        assert f"the same again as k1, k4, and images of 32 px: {needed / 1e9:.3g} GB" in out
        passes.clear()
    code, _, err = pipeline(*arguments)
    assert code == 0, err
    assert sum(passes) == 2 * 24  # two views; every shard of 8 in one batch

    store = open_store(tmp_path / "store")
    assert set(store.manifest.fields) == {"k1", "k4"}
    pixels = torch.from_numpy(rows_of(store, "center", "image")).permute(0, 3, 1, 2)
    plain = {"layers": None, "combination": None}
    for name, choice in {
        "": {"layers": (1, 3), "combination": "mean+spatial-mean"},
        "fields/k1": plain,
        "fields/k4": {"layers": (0, 1, 2, 3), "combination": "mean"},
    }.items():
        encoder = create_encoder("vit_small_patch16_dinov3_qkvb", "random:0", **SIZE, **choice)
        found = open_store(tmp_path / "store" / name)
        assert found.recipe.encoder == encoder.identity
        assert found.plan == store.plan
        np.testing.assert_array_equal(rows_of(found, "center", "image"), rows_of(store, "center", "image"))
        (output,) = encoder.encode_all(pixels, (encoder.aggregation,), class_token=True)
        np.testing.assert_allclose(rows_of(found, "center", "tokens"), output.tokens, atol=4e-3)
        np.testing.assert_allclose(rows_of(found, "center", "cls"), output.class_token, atol=4e-3)
        assert found.recipe.fields("flip") == ("tokens", "cls")
        assert pipeline("verify", tmp_path / "store" / name)[0] == 0
    image = store.path / "center" / "image" / "c" / "0" / "0" / "0" / "0"
    if form == "zarr":
        assert image.stat().st_nlink == 3

    assert pipeline("report", store.path)[0] == 0
    page = store.path.with_name("store.html").read_text()
    assert "mean+spatial-mean of blocks 1 3" in page
    assert "mean of blocks 0 1 2 3" in page
    assert "From above: crops, this store, k1, k4." in page
    deviation = open_store(store.path / "fields" / "k4").statistics(("center", "flip")).variance.mean()
    assert f"<td>{deviation:.4f}</td>" in page

    before = sum(passes)
    code, _, err = pipeline(*arguments)
    assert code == 0, err
    assert sum(passes) == before


def test_an_interrupted_pass_goes_on_with_what_each_store_lacks(folder, tmp_path, pipeline, passes):
    arguments = [
        "encode",
        folder,
        "--out",
        tmp_path / "store",
        "--shards",
        3,
        "--views",
        "center",
        *ARGUMENTS,
    ]
    assert pipeline(*arguments, "--layers", "1,3")[0] == 0
    done = sum(passes)
    code, _, err = pipeline(*arguments, "--layers", "1,3", "--also", "k1=3")
    assert code == 0, err
    assert sum(passes) == 2 * done  # only the companion's
    assert open_store(tmp_path / "store").manifest.fields.keys() == {"k1"}
    assert pipeline("verify", tmp_path / "store" / "fields" / "k1")[0] == 0


def test_int8_companions_have_codes_of_their_own(folder, tmp_path, pipeline):
    arguments = [
        "encode",
        folder,
        "--out",
        tmp_path / "store",
        "--shards",
        2,
        "--views",
        "center",
        *ARGUMENTS,
    ]
    arguments += ["--dtype", "int8", "--allow-error", "1", "--layers", "1,3", "--also", "k1=3"]
    code, _, err = pipeline(*arguments)
    assert code == 0, err
    store, field = (open_store(tmp_path / "store" / name) for name in ("", "fields/k1"))
    assert store.code.digest != field.code.digest


def test_class_tokens_are_read_by_loader_and_dataset(folder, tmp_path, pipeline):
    arguments = ["encode", folder, "--out", tmp_path / "store", "--shards", 2, *ARGUMENTS, "--class-token"]
    assert pipeline(*arguments)[0] == 0
    store = open_store(tmp_path / "store")
    expected = dict(zip(store.valid_rows.tolist(), rows_of(store, "center", "cls"), strict=True))
    with Loader(store, fields=("tokens", "cls"), views=("center",), seed=0, global_batch_size=7) as loader:
        batch = next(iter(loader))
        for row, found in zip(batch.rows.tolist(), batch.arrays["cls"], strict=True):
            np.testing.assert_array_equal(found, expected[row])
        batch.release()
    sample = SampleDataset(store.path, fields=("tokens", "cls"), views=("center",), seed=0)[3]
    np.testing.assert_array_equal(sample["cls"], expected[sample["row"]])
    assert "center/cls" in pipeline("inspect", store.path)[1]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (
            ["--class-token", "--encoder", "vit_base_patch16_siglip_256.v2_webli"],
            "has no class token; leave it out",
        ),
        (["--also", "k9=9"], "--also k9 must be within the 4 blocks of"),
        (["--also", "k2=3,1"], "--also k2 must name each block once, in ascending order, got 3,1; use 1,3"),
        (["--also", "k=1", "k=2"], "--also must give each field a name of its own, got k=1 k=2"),
        (["--also", "1,2"], "--also takes NAME=LAYERS, NAME a plain word, got '1,2'; such as k23=1-23"),
        (["--also", "k1=1:sum"], "--combination must be one of mean, mean+spatial-mean, got sum"),
    ],
)
def test_what_cannot_be_stored_is_refused_in_one_line(folder, tmp_path, pipeline, more, complaint):
    arguments = ["encode", folder, "--out", tmp_path / "store", "--shards", 2, *ARGUMENTS]
    code, _, err = pipeline(*arguments, *more)
    assert code == 2
    assert complaint in err
    assert err.count("\n") == 1
    assert not (tmp_path / "store").exists()
