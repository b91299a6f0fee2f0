"""Sources, feature passes and references with a tiny feature network: the same numbers whoever reads what."""

import itertools
import os
import re
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval.images.sources import (
    NpzImages,
    SourceImages,
    StoreImages,
    blocks,
    decoding_threads,
    open_images,
)
from eval.metrics.extraction import FeatureSet, extract, gathered, share
from eval.metrics.reference import load_reference, save_reference
from shards import find_images
from shards.errors import UsageError, UserError
from shards.images import center_crop, decode_image
from shards.reading.store import open_store

SIZE = (16, 16)


class Shares:
    """A process among several whose results are exchanged by hand."""

    def __init__(self, rank, world_size):
        self.rank, self.world_size, self.is_main_process = rank, world_size, rank == 0
        self.device = torch.device("cpu")
        self.results = []

    def gather(self, value):
        self.results.append(value)
        return [value]


class TinyFeatures:
    """A feature network of one random matrix."""

    name, digest, main = "tiny", "0", "pool"

    def __init__(self, width=5):
        generator = torch.Generator().manual_seed(0)
        self._weight = torch.randn(3 * SIZE[0] * SIZE[1], width, generator=generator) / 100

    def features(self, images):
        pool = images.flatten(1).float() @ self._weight
        return {"pool": pool, "spatial": pool[:, :2] * 2, "logits": pool}


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (70, *SIZE, 3), dtype=np.uint8)


@pytest.fixture
def npz(images, tmp_path):
    np.savez(tmp_path / "samples.npz", images)
    return tmp_path / "samples.npz"


def _expected(images):
    return TinyFeatures().features(torch.from_numpy(images).permute(0, 3, 1, 2))["pool"].numpy()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shared_passes_merge_to_one_pass_over_everything(images, npz, world_size):
    whole = FeatureSet()
    for rank in range(world_size):
        team = Shares(rank, world_size)
        part = extract(NpzImages(npz), TinyFeatures(), team, moments={"pool"}, keep={"logits"}, label="")
        whole.merge(part)
    expected = _expected(images)
    np.testing.assert_allclose(whole.gaussian("pool").covariance, np.cov(expected, rowvar=False), rtol=1e-5)
    np.testing.assert_allclose(whole.features("logits"), expected, atol=1e-3)
    assert whole.gaussian("pool").count == 70


def test_shares_are_consecutive_and_complete():
    for total in (0, 1, 7, 9):
        for world_size in (1, 2, 3):
            ranges = [share(total, Shares(rank, world_size)) for rank in range(world_size)]
            assert ranges[0][0] == 0
            assert ranges[-1][1] == total
            assert all(one[1] == other[0] for one, other in itertools.pairwise(ranges))


def test_gathering_keeps_the_order_of_the_ranks(images):
    sets = []
    for block in np.split(images, [20, 45]):
        found = FeatureSet()
        features = TinyFeatures().features(torch.from_numpy(block).permute(0, 3, 1, 2))
        found.add(features, moments={"pool"}, keep={"pool"})
        sets.append(found)

    class Exchange(Shares):
        def gather(self, value):
            return sets

    whole = gathered(sets[0], Exchange(0, 3))
    np.testing.assert_allclose(whole.features("pool"), _expected(images), atol=1e-3)


def test_blocks_cover_a_range():
    assert list(blocks(2, 9, 3)) == [(2, 5), (5, 8), (8, 9)]


def test_a_folder_is_read_in_the_order_of_names_through_the_one_crop(tmp_path):
    rng = np.random.default_rng(1)
    pictures = {}
    for name in ("b/2.jpg", "a/9.png", "b/1.PNG"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        pictures[name] = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pictures[name]).save(path)
    (tmp_path / "readme.txt").write_text("not an image")
    source = SourceImages(tmp_path, SIZE)
    assert len(source) == 3
    found = source.read(0, 3)
    np.testing.assert_array_equal(found[0], center_crop(pictures["a/9.png"], 16))
    np.testing.assert_array_equal(found[1], center_crop(pictures["b/1.PNG"], 16))


def test_a_reference_holds_the_images_that_encode_finds(tmp_path):
    for name in (
        "in/a/0.jpg",
        "in/a/1.gif",
        "in/a/2.tif",
        "in/a/.hidden.jpg",
        "elsewhere/3.jpg",
        "elsewhere/4.jpg",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (int(path.stem[-1]) if path.stem[-1].isdigit() else 9, 0, 0)).save(path)
    (tmp_path / "in/a/._0.jpg").write_bytes(b"what another system keeps beside a file")
    (tmp_path / "in/b").symlink_to("../elsewhere")
    source = open_images(tmp_path / "in", SIZE)
    assert len(source) == len(find_images(str(tmp_path / "in")).images) == 5
    assert source.kind == "folder"
    assert source.read(0, 5).shape == (5, *SIZE, 3)


def test_a_reference_may_be_a_tar(tmp_path):
    Image.new("RGB", (20, 20), (7, 0, 0)).save(tmp_path / "0.png")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "0.png", "a/0.png")
    source = open_images(tmp_path / "x.tar", SIZE)
    assert (source.kind, source.read(0, 1)[0, 0, 0].tolist()) == ("files", [7, 0, 0])


def test_files_are_decoded_by_several_threads_and_kept_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.images.sources.decoding_threads", lambda: 2)
    together = threading.Barrier(2)

    def decode(content):
        together.wait(20)  # in vain if one thread decoded one file after the other
        return decode_image(content)

    monkeypatch.setattr("eval.images.sources.decode_image", decode)
    for number in range(6):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / f"{number}.png")
    source = SourceImages(tmp_path, SIZE)
    assert source.read(0, 6)[:, 0, 0, 0].tolist() == list(range(6))
    assert source.read_some(np.array([4, 1]))[:, 0, 0, 0].tolist() == [4, 1]


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(24))
    assert decoding_threads() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert decoding_threads() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    assert decoding_threads() == 1


def test_images_by_number_are_those_of_the_whole(store, npz):
    for source in (StoreImages(store), NpzImages(npz)):
        numbers = np.array([20, 3, 4])
        np.testing.assert_array_equal(source.read_some(numbers), source.read(0, 25)[numbers])


def test_a_store_gives_its_valid_rows(store):
    source = StoreImages(store)
    opened = open_store(store)
    assert len(source) == len(opened.valid_rows) == 25
    one = np.empty((1, *SIZE, 3), np.uint8)
    opened.reader("center", "image").read(opened.valid_rows[4:5], one)
    np.testing.assert_array_equal(source.read(3, 6)[1:2], one)


def test_sources_are_told_apart_by_what_they_are(store, npz, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    assert open_images(store, SIZE).kind == "store"
    assert open_images(npz, SIZE).kind == "samples"
    assert open_images(tmp_path, SIZE).kind == "folder"


def test_sources_that_cannot_be_compared_are_refused(store, npz, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "note.txt").write_text("x")
    for path, reason in [
        (empty, "must hold"),
        (store, "one size, .* has 16×16 pixels and ours are 32×32"),
        (npz, "has 16×16 pixels and ours are 32×32"),
        (tmp_path / "note.txt", r"SOURCE must be an image folder, .* \(.txt\)"),
    ]:
        with pytest.raises(UsageError, match=reason):
            open_images(path, (32, 32))


def test_a_file_that_is_no_image_is_refused_by_name(tmp_path):
    for name in ("broken.png", "worse.png"):
        (tmp_path / name).write_bytes(b"not a png")
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"broken\.png is not a readable image"):
        SourceImages(tmp_path, SIZE).read(0, 3)


def _reference(path: Path, **changes):
    wanted = {"features": {"pool", "spatial"}, "manifold": True, **changes}
    return load_reference(path, SIZE, TinyFeatures(), Shares(0, 1), **wanted)


def test_a_reference_of_images_is_computed(images, npz):
    found = _reference(npz)
    assert (found.kind, found.count) == ("samples", 70)
    expected = _expected(images)
    np.testing.assert_allclose(found.gaussians["pool"].mean, expected.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.manifold, expected, atol=1e-3)


def test_a_published_batch_gives_its_statistics_and_its_images(images, tmp_path):
    statistics = {"mu": np.ones(5), "sigma": np.eye(5), "mu_s": np.zeros(2), "sigma_s": 2 * np.eye(2)}
    path = tmp_path / "VIRTUAL_imagenet256_labeled.npz"
    np.savez(path, arr_0=images, **statistics)
    found = _reference(path)
    assert found.kind == "statistics"
    np.testing.assert_array_equal(found.gaussians["pool"].mean, np.ones(5))
    np.testing.assert_array_equal(found.gaussians["spatial"].covariance, 2 * np.eye(2))
    np.testing.assert_allclose(found.manifold, _expected(images), atol=1e-3)


def test_statistics_without_what_is_asked_for_are_refused(images, tmp_path):
    path = tmp_path / "statistics.npz"
    np.savez(path, mu=np.ones(5), sigma=np.eye(5))
    assert _reference(path, features={"pool"}, manifold=False).manifold is None
    with pytest.raises(UsageError, match="no spatial statistics of inception"):
        _reference(path)
    with pytest.raises(UsageError, match="need reference images"):
        _reference(path, features={"pool"})


def test_saved_statistics_stand_for_the_images_they_were_computed_from(npz, tmp_path):
    saved, computed = tmp_path / "out" / "saved.npz", _reference(npz)
    save_reference(npz, SIZE, {"inception": TinyFeatures}, Shares(0, 1), saved)
    found = _reference(saved)
    assert (found.kind, found.count) == ("samples", 70)
    for name in ("pool", "spatial"):
        np.testing.assert_array_equal(found.gaussians[name].mean, computed.gaussians[name].mean)
        np.testing.assert_array_equal(found.gaussians[name].covariance, computed.gaussians[name].covariance)
    np.testing.assert_array_equal(found.manifold, computed.manifold)
    # Readers of the published layout find their arrays.
    with np.load(saved) as archive:
        assert {"mu", "sigma", "mu_s", "sigma_s"} < set(archive.files)
    assert _reference(saved, manifold=False).manifold is None


def test_saved_statistics_of_other_weights_are_refused(npz, tmp_path):
    saved = tmp_path / "saved.npz"
    other = TinyFeatures()
    other.digest = "other weights"
    save_reference(npz, SIZE, {"inception": lambda: other}, Shares(0, 1), saved)
    with pytest.raises(UsageError, match="statistics of other weights"):
        _reference(saved)
    with pytest.raises(UsageError, match="holds statistics already"):
        save_reference(saved, SIZE, {"inception": lambda: other}, Shares(0, 1), tmp_path / "again.npz")


def test_broken_statistics_are_refused(tmp_path):
    path = tmp_path / "statistics.npz"
    np.savez(path, mu=np.ones(5), sigma=np.eye(4))
    with pytest.raises(
        UserError, match=re.escape("mu has shape [5] and sigma [4, 4]; they must be [n] and [n, n]")
    ):
        _reference(path, features={"pool"}, manifold=False)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole"):
        _reference(path, features={"pool"}, manifold=False)
