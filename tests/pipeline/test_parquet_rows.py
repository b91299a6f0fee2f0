"""Single images out of parquet files, for many threads at once."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.sources import parquet_rows
from shards.sources.parquet_rows import ParquetRows

IMAGES = [np.random.default_rng(number).bytes(50 + number) for number in range(60)]


@pytest.fixture
def file(tmp_path):
    """A parquet file of 60 images in row groups of 7."""
    column = pa.array([{"bytes": image, "path": None} for image in IMAGES])
    pq.write_table(pa.table({"image": column, "label": range(60)}), tmp_path / "x.parquet", row_group_size=7)
    return tmp_path / "x.parquet"


def test_many_threads_each_get_the_image_they_ask_for(file):
    rows = np.random.default_rng(0).integers(0, 60, 600).tolist()
    reader = ParquetRows()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: reader.read(file, row), rows))
    assert found == [IMAGES[row] for row in rows]


def test_a_row_group_wanted_by_several_threads_is_decoded_once(file, monkeypatch):
    decoded = []
    working = parquet_rows.bounded_batches

    def counted(path, file, group, columns):
        decoded.append(group)
        return working(path, file, group, columns)

    monkeypatch.setattr(parquet_rows, "bounded_batches", counted)
    reader = ParquetRows()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: reader.read(file, row), [*range(14)] * 5))
    assert sorted(decoded) == [0, 1]


def test_what_could_not_be_read_once_is_read_again(file):
    reader = ParquetRows()
    assert reader.read(file, 0) == IMAGES[0]
    file.rename(file.with_suffix(".away"))
    with pytest.raises(FileNotFoundError):
        reader.read(file, 30)
    file.with_suffix(".away").rename(file)
    assert reader.read(file, 30) == IMAGES[30]
