"""The samples file: any order, any interruption, exactly what the published evaluators read."""

import subprocess
import sys
import zipfile

import numpy as np
import pytest

from eval.images.samples import SamplesFile, map_samples
from shards.errors import UserError


def _images(count, height=4, width=5):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def _write_all(file, images):
    file.create()
    with file:
        file.write(np.arange(len(images)), images)
    file.finish()


def test_images_written_in_any_order_come_back_in_theirs(tmp_path):
    images, file = _images(7), SamplesFile(tmp_path / "samples.npz", 7, (4, 5))
    file.create()
    with file:
        for numbers in ([5, 1], [6], [0, 2, 3, 4]):
            file.write(numbers, images[numbers])
    file.finish()
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive.files == ["arr_0"]
        np.testing.assert_array_equal(archive["arr_0"], images)
    assert zipfile.ZipFile(tmp_path / "samples.npz").testzip() is None
    np.testing.assert_array_equal(map_samples(tmp_path / "samples.npz"), images)
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


def test_an_interrupted_file_says_what_is_missing_and_continues(tmp_path):
    images = _images(6)
    first = SamplesFile(tmp_path / "samples.npz", 6, (4, 5))
    first.create()
    with first:
        first.write([4, 1], images[[4, 1]])
    second = SamplesFile(tmp_path / "samples.npz", 6, (4, 5))
    second.create()
    assert second.pending().tolist() == [0, 2, 3, 5]
    assert not second.finished
    with second:
        second.write(second.pending(), images[second.pending()])
    second.finish()
    np.testing.assert_array_equal(map_samples(tmp_path / "samples.npz"), images)


def test_several_processes_fill_one_file(tmp_path):
    file = SamplesFile(tmp_path / "samples.npz", 9, (4, 5))
    file.create()
    program = (
        "import sys, numpy as np; from pathlib import Path; from eval.images.samples import SamplesFile\n"
        "rank = int(sys.argv[2])\n"
        "with SamplesFile(Path(sys.argv[1]), 9, (4, 5)) as file:\n"
        "    for i in range(rank, 9, 3): file.write([i], np.full((1, 4, 5, 3), i, np.uint8))\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "samples.npz"), str(rank)])
        for rank in range(3)
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    file.finish()
    assert map_samples(tmp_path / "samples.npz")[:, 0, 0, 0].tolist() == list(range(9))


def test_unfinished_files_of_another_size_are_refused(tmp_path):
    SamplesFile(tmp_path / "samples.npz", 6, (4, 5)).create()
    with pytest.raises(UserError, match=r"must have 420 bytes, found 360; remove it"):
        SamplesFile(tmp_path / "samples.npz", 7, (4, 5)).create()


@pytest.mark.parametrize("keep", [10, 200, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "samples.npz"
    _write_all(SamplesFile(path, 7, (4, 5)), _images(7))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="not a whole"):
        map_samples(path)


def test_samples_written_by_numpy_are_mapped_and_compressed_ones_read(tmp_path):
    images = _images(3)
    np.savez(tmp_path / "a.npz", arr_0=images, labels=np.arange(3))
    np.savez_compressed(tmp_path / "b.npz", images)
    mapped = map_samples(tmp_path / "a.npz")
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, images)
    np.testing.assert_array_equal(map_samples(tmp_path / "b.npz"), images)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"arr_0": np.zeros((2, 4, 5, 3))}, "must be uint8"),
        ({"arr_0": np.zeros((2, 4, 5), np.uint8)}, "must be uint8"),
        ({"other": np.zeros((2, 4, 5, 3), np.uint8)}, "array arr_0"),
    ],
)
def test_other_arrays_are_refused(tmp_path, arrays, reason):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=reason):
        map_samples(tmp_path / "a.npz")


def test_python_objects_are_never_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="Python objects"):
        map_samples(tmp_path / "a.npz")


def test_what_a_kill_left_beside_the_final_file_is_removed(tmp_path):
    samples = SamplesFile(tmp_path / "samples.npz", 2, (4, 4))
    samples.create()
    with samples:
        samples.write([0, 1], np.zeros((2, 4, 4, 3), np.uint8))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    samples.finish()
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / f".samples.npz.{32 * '0'}.tmp").write_bytes(b"half of the final file")
    samples.drop_unfinished()
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]
