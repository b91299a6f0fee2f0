"""Every form and storage type keeps the store's contract."""

from __future__ import annotations

import pytest

from shards.testing.contract import ALL_KINDS, StoreContract, StoreKind


class TestEveryKind(StoreContract):
    @pytest.fixture(scope="class", params=ALL_KINDS, ids=str)
    @classmethod
    def kind(cls, request: pytest.FixtureRequest) -> StoreKind:
        kind: StoreKind = request.param
        return kind
