import numpy as np
import pytest
from PIL import Image

from pipeline.demo import photographs as demo


def read_folder(folder):
    return {path.relative_to(folder): np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))}


def test_each_photograph_becomes_a_class_of_square_crops(tmp_path):
    count = demo.write_photographs(tmp_path / "photographs", per_class=2)
    crops = read_folder(tmp_path / "photographs")
    assert count == len(crops) == 2 * len(demo.PHOTOGRAPHS) >= 24
    assert {path.parts[0] for path in crops} == set(demo.PHOTOGRAPHS)
    assert {crop.shape for crop in crops.values()} == {(demo.SAVED_SIDE, demo.SAVED_SIDE, 3)}


def test_crops_depend_on_the_seed_alone_and_differ_from_each_other(tmp_path):
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        demo.write_photographs(tmp_path / name, per_class=2, seed=seed)
    first, again, other = (read_folder(tmp_path / name) for name in ("first", "again", "other"))
    assert all(np.array_equal(first[path], again[path]) for path in first)
    assert not any(np.array_equal(first[path], other[path]) for path in first)
    for name in demo.PHOTOGRAPHS:
        one, two = (crop for path, crop in first.items() if path.parts[0] == name)
        assert not np.array_equal(one, two)


def test_a_complete_folder_is_left_alone_and_a_half_one_is_made_anew(tmp_path):
    folder = tmp_path / "photographs"
    demo.write_photographs(folder, per_class=1)
    kept = folder / "cat" / "0000.png"
    before = kept.stat().st_mtime_ns
    demo.write_photographs(folder, per_class=1)
    assert kept.stat().st_mtime_ns == before

    (tmp_path / "photographs.json").unlink()  # as after a kill: the folder's settings are written last
    kept.unlink()
    demo.write_photographs(folder, per_class=1)
    assert kept.exists()


def test_a_missing_wheel_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(demo.PHOTOGRAPHS, "cat", ("no_such_wheel", "cat.png", 1.0))
    with pytest.raises(demo.UsageError, match=r"no_such_wheel.*pip install"):
        demo.open_photograph("cat")
