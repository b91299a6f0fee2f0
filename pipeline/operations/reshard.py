"""`pipeline reshard`: the same rows in another number of shards."""

import numpy as np

from pipeline.operations.copying import copy
from pipeline.settings.operations import ReshardConfig
from shards import UsageError, open_store
from shards.writing.copying import copied_recipe
from shards.writing.selection import Part, reshuffled


def reshard(config: ReshardConfig) -> None:
    """Deal a store's rows to shards again, with the store's own seed.

    Raises:
        UserError: If the store has that many shards already, or cannot have them.
    """
    store = open_store(config.store, follow_links=config.follow_links)
    if config.shards == store.recipe.num_shards and not store.recipe.earlier:
        raise UsageError(f"{config.store} has {config.shards} shards already; name another --shards")
    part = Part(store, np.arange(store.plan.num_images))
    selection = reshuffled([part], store.class_names, config.shards, store.recipe.seed)
    copy(selection, copied_recipe(selection), config.out, command="reshard", code=store.code)
