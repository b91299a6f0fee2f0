"""What the views show: centre crops, mirror images, and random crops that depend on seed, key and number alone."""

import io
import itertools

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import crop, resize

from pipeline.encoders.encoder import create_encoder
from pipeline.settings.config import StoreConfig
from pipeline.sources.listing import list_source
from shards.draws import integers_below
from shards.errors import UsageError
from shards.images import FORMATS, random_crops
from shards.metadata.plan import Plan
from shards.reading.store import open_store

VIEWS = "center,flip,crop:3"


def read_all(store, view, field):
    """Every valid row of a field by its image's key."""
    rows = store.valid_rows
    reader = store.reader(view, field)
    out = np.empty((len(rows), *reader.row_shape), reader.dtype)
    reader.read(rows, out)
    table = store.index.table("key", "valid").to_pylist()
    return dict(zip((line["key"] for line in table if line["valid"]), out, strict=True))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (301, 301), (97, 640), (384, 384)])
@pytest.mark.parametrize("side", [256, 51])
def test_random_crops_are_cut_from_what_torchvision_s_resize_gives(draw, size, side):
    image = draw(3, size)
    streams = [f"crop{number}/a" for number in range(4)]
    resized = resize(Image.fromarray(image), int(1.5 * side), InterpolationMode.BICUBIC)
    limits = (resized.height - side + 1, resized.width - side + 1)
    for stream, ours in zip(streams, random_crops(image, side, streams, seed=5), strict=True):
        top, left = integers_below(limits, seed=5, stream=stream)
        assert 0 <= top < limits[0]
        assert 0 <= left < limits[1]
        np.testing.assert_array_equal(ours, np.asarray(crop(resized, top, left, side, side)))


def test_the_places_of_crops_are_spread_evenly():
    limits = (129, 257)
    places = np.array(
        [integers_below(limits, seed=0, stream=f"crop{k % 2}/{k // 2}.jpg") for k in range(4000)]
    )
    assert places.min(axis=0).tolist() == [0, 0]
    assert places.max(axis=0).tolist() == [128, 256]
    np.testing.assert_allclose(places.mean(axis=0), [64, 128], rtol=0.04)
    assert abs(np.corrcoef(places.T)[0, 1]) < 0.05


def test_the_first_places_never_change():
    """They are part of the store format."""
    assert integers_below((129, 257), seed=0, stream="crop0/class/a.jpg") == [120, 15]
    assert integers_below((129, 257), seed=0, stream="crop1/class/a.jpg") == [97, 12]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("center", ("center",)),
        ("center,flip,crop:2", ("center", "flip", "crop0", "crop1")),
        ("crop:1", ("crop0",)),
        ("center,crop3", ("center", "crop3")),
    ],
)
def test_views_are_named_on_the_command_line(text, names):
    assert StoreConfig(shards=1, views=text).view_names() == names


@pytest.mark.parametrize(
    "text", ["crop", "crop:0", "crop:-1", "crop:two", "crop-1", "center,crop:", "centre"]
)
def test_views_that_do_not_exist_are_refused(text):
    with pytest.raises(UsageError, match="--views must be made of center, flip and crop:K"):
        StoreConfig(shards=1, views=text).view_names()


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_each_crop_has_its_own_image_and_that_image_s_tokens(folder, tmp_path, tiny, pipeline, form):
    arguments = ("encode", folder, "--shards", 4, "--seed", 7, "--views", VIEWS, "--format", form, *tiny)
    code, _, err = pipeline(*arguments, "--out", tmp_path / "store")
    assert code == 0, err
    store = open_store(tmp_path / "store")
    assert store.views == ("center", "flip", "crop0", "crop1", "crop2")
    encoder = create_encoder("test_vit", "random:0", input_size=32, model_args={"depth": 1})
    for view in ("crop0", "crop1", "crop2"):
        images, tokens = read_all(store, view, "image"), read_all(store, view, "tokens")
        for key, image in images.items():
            source = np.asarray(Image.open(folder / key))
            np.testing.assert_array_equal(image, random_crops(source, 32, [f"{view}/{key}"], seed=7)[0])
            pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
            np.testing.assert_allclose(tokens[key], encoder.encode(pixels)[0], rtol=0, atol=4e-3)
    assert pipeline("verify", tmp_path / "store")[0] == 0
    assert pipeline("report", tmp_path / "store")[0] == 0


def test_crops_depend_neither_on_shards_nor_workers_nor_the_other_views(folder, tmp_path, tiny, pipeline):
    variants = {
        "one": ("--shards", 4, "--views", VIEWS),
        "other": ("--shards", 7, "--views", "crop:2", "--decode-threads", 1, "--batch-size", 2),
        "seeded": ("--shards", 4, "--views", "crop:2", "--seed", 1),
    }
    for name, more in variants.items():
        code, _, err = pipeline("encode", folder, "--out", tmp_path / name, *more, *tiny)
        assert code == 0, err
    one, other, seeded = (read_all(open_store(tmp_path / name), "crop1", "image") for name in variants)
    assert one.keys() == other.keys()
    for key, image in one.items():
        np.testing.assert_array_equal(image, other[key])
    assert any((one[key] != seeded[key]).any() for key in one)


def test_a_store_is_not_continued_with_another_number_of_crops(folder, tmp_path, tiny, pipeline):
    arguments = ("encode", folder, "--out", tmp_path / "store", "--shards", 4, *tiny)
    assert pipeline(*arguments, "--views", "crop:2")[0] == 0
    code, _, err = pipeline(*arguments, "--views", "crop:3")
    assert code == 1
    assert "views is ['crop0', 'crop1'], the other has ['crop0', 'crop1', 'crop2']" in err


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_an_image_repaired_later_gets_the_same_crops_and_tokens(folder, tmp_path, tiny, pipeline, dtype):
    more = ("--shards", 3, "--views", VIEWS, "--dtype", dtype, "--allow-error", 0.5, *tiny)
    assert pipeline("encode", folder, "--out", tmp_path / "whole", *more)[0] == 0
    broken = folder / "class 1" / "04.png"
    content = broken.read_bytes()
    size = len(content)
    broken.write_bytes(bytes(size))
    assert pipeline("encode", folder, "--out", tmp_path / "store", *more)[0] == 0
    reasons = [line["reason"] for line in open_store(tmp_path / "store").index.table("reason").to_pylist()]
    assert [reason for reason in reasons if reason] == [
        f"not an image of a known format ({', '.join(FORMATS)})"
    ]
    broken.write_bytes(content)
    code, _, err = pipeline("encode", folder, "--out", tmp_path / "store", *more, "--retry-quarantined")
    assert code == 0, err
    whole, repaired = open_store(tmp_path / "whole"), open_store(tmp_path / "store")
    for view in ("center", "crop0", "crop2"):
        expected, found = (read_all(store, view, "image") for store in (whole, repaired))
        np.testing.assert_array_equal(found["class 1/04.png"], expected["class 1/04.png"])
    if dtype == "float32":  # the int8 code was fitted without the broken image
        for view in whole.views:
            expected, found = (read_all(store, view, "tokens") for store in (whole, repaired))
            np.testing.assert_array_equal(found["class 1/04.png"], expected["class 1/04.png"])
    assert pipeline("verify", tmp_path / "store")[0] == 0


def test_a_view_that_is_missing_alone_is_encoded_alone(folder, tmp_path, tiny, pipeline):
    arguments = ("encode", folder, "--out", tmp_path / "store", "--shards", 2, "--views", VIEWS, *tiny)
    assert pipeline(*arguments)[0] == 0
    store = open_store(tmp_path / "store")
    expected = {view: read_all(store, view, "tokens") for view in store.views}
    (tmp_path / "store" / "manifest.json").unlink()
    for view in ("flip", "crop1"):
        for path in [
            *(tmp_path / "store" / view).rglob("c/1/0*/**/*"),
            tmp_path / "store" / "commits" / view / "00001.json",
        ]:
            if path.is_file():
                path.unlink()
    code, _, err = pipeline(*arguments)
    assert code == 0, err
    again = open_store(tmp_path / "store")
    for view in again.views:
        for key, tokens in read_all(again, view, "tokens").items():
            np.testing.assert_array_equal(tokens, expected[view][key])


def test_the_plan_alone_says_where_an_image_is_cut(folder):
    """The key in the plan is what decides, also for images inside archives."""
    plan = Plan.build(list_source(str(folder)).records, (), 3, seed=0)
    image = np.asarray(Image.open(io.BytesIO((folder / plan.keys[0]).read_bytes())))
    one, other = (random_crops(image, 16, [f"crop0/{key}"], seed=0)[0] for key in plan.keys[:2])
    assert (one != other).any()


@pytest.mark.parametrize(("images", "tokens"), [("blosc", "none"), ("none", "zstd")])
def test_images_and_tokens_are_compressed_each_by_its_own_setting(
    folder, tmp_path, tiny, pipeline, images, tokens
):
    more = ("--shards", 2, "--views", "center,crop:1", *tiny)
    assert pipeline("encode", folder, "--out", tmp_path / "plain", *more)[0] == 0
    compression = ("--image-compression", images, "--compression", tokens)
    code, _, err = pipeline("encode", folder, "--out", tmp_path / "store", *more, *compression)
    assert code == 0, err
    plain, store = open_store(tmp_path / "plain"), open_store(tmp_path / "store")
    for view, (name, codec) in itertools.product(
        ("center", "crop0"), (("image", images), ("tokens", tokens))
    ):
        expected = read_all(plain, view, name)
        stock = zarr.open_array(tmp_path / "store" / view / name, mode="r")
        assert [c.to_dict()["name"] for c in stock.compressors] == ([] if codec == "none" else [codec])
        np.testing.assert_array_equal(stock[store.valid_rows], list(expected.values()))
        found = read_all(store, view, name)
        assert all((found[key] == row).all() for key, row in expected.items())
    assert pipeline("verify", tmp_path / "store")[0] == 0
    back = ("convert", tmp_path / "store", "--out", tmp_path / "back", "--format", "zarr")
    assert pipeline(*back)[0] == 0
    assert open_store(tmp_path / "back").recipe == plain.recipe


def test_tar_files_are_not_compressed_inside(folder, tmp_path, tiny, pipeline):
    more = ("--shards", 2, "--format", "webdataset", "--image-compression", "blosc", *tiny)
    code, _, err = pipeline("encode", folder, "--out", tmp_path / "store", *more)
    assert code == 2
    assert "compression is zarr's own" in err
