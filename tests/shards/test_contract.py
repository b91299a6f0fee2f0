"""Every format and storage type keeps the store's contract."""

from __future__ import annotations

import pytest

from shards import formats
from shards.metadata.identity import FORMATS
from shards.testing.contract import ALL_KINDS, StoreContract, StoreKind
from shards.testing.stock_readers import STOCK_ROWS


def test_every_format_that_a_recipe_names_is_implemented_and_read_by_a_stock_reader():
    assert set(formats.FORMATS) == set(FORMATS) == set(STOCK_ROWS)


class TestEveryKind(StoreContract):
    @pytest.fixture(scope="class", params=ALL_KINDS, ids=str)
    @classmethod
    def kind(cls, request: pytest.FixtureRequest) -> StoreKind:
        kind: StoreKind = request.param
        return kind
