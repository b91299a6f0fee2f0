"""Fitting the int8 code before the first shard: a sample of the images goes through the encoder once.

The plan is a seeded shuffle, so places spread evenly over it are a random sample, the same in every run. Every other
image is kept back from the fit, and the error is judged on those: a code is only as good as on what it has not seen.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.console import log
from pipeline.encode.claims import Task
from pipeline.encode.decoding import BatchDecoder, batch_length
from pipeline.encode.devices import named_devices
from pipeline.encode.execution import execution_of
from pipeline.encode.job import decode_threads_for
from pipeline.encoders.frozen import Encoder
from pipeline.settings.config import EncodeConfig
from pipeline.sources.crop_sources import crop_source
from pipeline.sources.crops import Crops
from shards import (
    Int8Code,
    Plan,
    Recipe,
    Store,
    UserError,
    chosen_tokens,
    describe_error,
    even_spread,
    fit_and_judge,
    require_within,
)


def calibrate(config: EncodeConfig, plan: Plan, recipe: Recipe, encoder: Encoder) -> Int8Code:
    """Fit the code of an int8 store and print its error.

    Raises:
        UserError: If a channel would lose more than is allowed, or no image can be decoded.
    """
    count = min(recipe.calibration_rows, plan.num_images)
    log(f"calibrating int8 on {count} images")
    encoder.to_device(named_devices(config.work.devices)[0], recipe.precision)
    calibration = fit_and_judge(sample_tokens(config, plan, recipe, encoder), aim=recipe.code_error)
    # Workers in other processes will need the device's memory.
    encoder.to_device(torch.device("cpu"), recipe.precision)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    calibration.require(config.store.allow_error)
    log(f"int8 {describe_error(calibration.error)}, on images the code was not fitted to")
    return calibration.code


def sample_tokens(config: EncodeConfig, plan: Plan, recipe: Recipe, encoder: Encoder) -> NDArray[np.float32]:
    """Encode some tokens of some images in every view.

    Returns:
        float32 [images, values, D]; images that cannot be decoded are left out.

    Raises:
        UserError: If none can be decoded, or the encoder gives NaN or infinity.
    """
    count = min(recipe.calibration_rows, plan.num_images)
    records = plan.records(even_spread(count, plan.num_images))
    source = crop_source(config, recipe, recipe.views, plan)
    decoder = BatchDecoder(
        source,
        length=batch_length(count, execution_of(recipe, config).batch_size),
        threads=decode_threads_for(config, 1),
    )
    kept = []
    for batch in decoder.batches(Task(0, recipe.views), records):
        good = [slot for slot, row in enumerate(batch.rows()) if row.reason is None]
        if good:
            kept.append(_some_tokens(batch.inputs[:, good], source.crops, recipe, encoder, count))
        decoder.recycle(batch)
    decoder.close()
    source.close()
    if not kept:
        raise UserError(f"none of the {count} images to calibrate int8 on can be decoded; repair the source")
    samples = np.concatenate(kept)
    if not np.isfinite(samples).all():
        raise UserError(
            "the encoder gives NaN or infinity, which no storage type keeps; use --precision float32"
        )
    return samples


def _some_tokens(
    images: Tensor, crops: Crops, recipe: Recipe, encoder: Encoder, num_images: int
) -> NDArray[np.float32]:
    images = images.to(encoder.device)
    parts = []
    for index, view in enumerate(recipe.views):
        tokens = encoder.encode(crops.shown(images, view)).cpu().numpy()
        parts.append(
            tokens[:, chosen_tokens(recipe.encoder.num_tokens, num_images, index, len(recipe.views))]
        )
    return np.concatenate(parts, axis=1)


def report_measured(store: Store, limit: float) -> None:
    """Print the int8 error of a finished store; raise an error where it is more than allowed.

    The store is finished either way: nothing has to be encoded again if the error is accepted.

    Raises:
        UserError: Naming the channels and what can be done.
    """
    if store.code is None:
        return
    errors = {view: store.code_error(view) for view in store.views}
    for view, error in errors.items():
        assert error is not None, view
        log(f"int8 {describe_error(error)}, in view {view}")
    for view, error in errors.items():
        assert error is not None, view
        require_within(
            error,
            limit,
            where=f"on the rows of view {view}",
            remedy=f"which keeps {store.path} as it is, or write another store with more --calibration-rows "
            "or another --dtype",
        )
