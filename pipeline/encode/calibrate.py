"""Fitting the int8 code before the first shard: a sample of the images goes through the encoder once.

The plan is a seeded shuffle, so places spread evenly over it are a random sample, the same in every run. Every other
image is kept back from the fit, and the error is judged on those: a code is only as good as on what it has not seen.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.console import say
from pipeline.encode.claims import Task
from pipeline.encode.decoding import BatchDecoder, batch_length
from pipeline.encode.devices import named_devices
from pipeline.encode.int8_error import describe_error, require_within
from pipeline.encode.job import decode_threads_for
from pipeline.encoders.encoder import Encoder
from pipeline.settings.config import EncodeConfig
from pipeline.sources.picture_sources import picture_source
from pipeline.sources.pictures import Pictures
from shards import Int8Code, Plan, Recipe, Store, UserError, as_mended, even_spread, fit_code

# Values a channel that are kept, of which the fit takes half: from 128 or more images they settle the worst trained
# channel's error to 0.01 points (benchmarks/quantisation.py), and float32 [65536, 768] is 200 MB.
_NUM_VALUES = 1 << 16


@dataclass(frozen=True)
class Calibration:
    """A fitted code and what it costs.

    Attributes:
        code: What the int8 numbers will stand for.
        error: RMS error of each channel on images the code was not fitted to, as a share of the channel's deviation,
            float64[D].
    """

    code: Int8Code
    error: NDArray[np.float64]

    def require(self, limit: float) -> None:
        """Refuses a code that costs a channel more than a limit.

        Raises:
            UserError: Naming the channels and what can be done.
        """
        require_within(
            self.error, limit, where="on images it was not fitted to", remedy="or store another --dtype"
        )


def calibrate(config: EncodeConfig, plan: Plan, recipe: Recipe, encoder: Encoder) -> Int8Code:
    """Fits the code of an int8 store and says what it costs.

    Raises:
        UserError: If a channel would lose more than is allowed, or no image can be decoded.
    """
    count = min(recipe.calibration_rows, plan.num_images)
    say(f"calibrating int8 on {count} images")
    encoder.place(named_devices(config.work.devices)[0], recipe.precision)
    calibration = fit_and_judge(sample_tokens(config, plan, recipe, encoder), aim=recipe.code_error)
    # Workers in other processes will need the device's memory.
    encoder.place(torch.device("cpu"), recipe.precision)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    calibration.require(config.store.allow_error)
    say(f"int8 {describe_error(calibration.error)}, on images the code was not fitted to")
    return calibration.code


def fit_and_judge(samples: NDArray[np.float32], *, aim: float = 0.0) -> Calibration:
    """A code from every other image's tokens, judged on the others'.

    Args:
        samples: Tokens [images, values, D].
        aim: See `shards.values.quantize.fit_code`.
    """
    width = samples.shape[-1]
    fitted, held_back = samples[::2].reshape(-1, width), samples[1::2].reshape(-1, width)
    code = fit_code(fitted, aim=aim)
    seen = held_back if len(held_back) else fitted
    lost = code.decode(code.encode(seen)).astype(np.float64) - seen
    square_error = np.square(lost).mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.sqrt(square_error / seen.astype(np.float64).var(axis=0))
    return Calibration(code, np.where(square_error == 0, 0.0, relative))


def sample_stored(store: Store, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Some tokens of some rows of a finished store in every view, as `sample_tokens` takes them from images."""
    parts = []
    for index, view in enumerate(store.views):
        chosen = _chosen_tokens(store.num_tokens, len(rows), index, len(store.views))
        reader = store.reader(view, "tokens")
        row = np.empty((1, *reader.row_shape), reader.dtype)
        kept = np.empty((len(rows), len(chosen), store.width), np.float32)
        for place, number in enumerate(rows.tolist()):
            reader.read([number], row)
            kept[place] = store.decode(row[:, chosen])[0]
        parts.append(kept)
    return np.concatenate(parts, axis=1)


def sample_tokens(config: EncodeConfig, plan: Plan, recipe: Recipe, encoder: Encoder) -> NDArray[np.float32]:
    """Some tokens of some images in every view.

    Returns:
        float32 [images, values, D]; images that cannot be decoded are left out.

    Raises:
        UserError: If none can be decoded, or the encoder gives NaN or infinity.
    """
    count = min(recipe.calibration_rows, plan.num_images)
    records = plan.records(even_spread(count, plan.num_images))
    source = picture_source(config.source_path(), recipe, recipe.views)
    decoder = BatchDecoder(
        source,
        length=batch_length(count, config.work.batch_size),
        threads=decode_threads_for(config, 1),
    )
    kept = []
    for batch in decoder.batches(Task(0, recipe.views), as_mended(records, source.mended)):
        good = [slot for slot, row in enumerate(batch.rows()) if row.reason is None]
        if good:
            kept.append(_some_tokens(batch.images[:, good], source.pictures, recipe, encoder, count))
        decoder.recycle(batch)
    decoder.close()
    source.close()
    if not kept:
        raise UserError(f"none of the {count} images to calibrate int8 on can be decoded; mend the source")
    samples = np.concatenate(kept)
    if not np.isfinite(samples).all():
        raise UserError(
            "the encoder gives NaN or infinity, which no storage type keeps; use --precision float32"
        )
    return samples


def _some_tokens(
    images: Tensor, pictures: Pictures, recipe: Recipe, encoder: Encoder, num_images: int
) -> NDArray[np.float32]:
    images = images.to(encoder.get_buffer("mean").device)
    parts = []
    for index, view in enumerate(recipe.views):
        tokens = encoder.encode(pictures.shown(images, view)).cpu().numpy()
        parts.append(
            tokens[:, _chosen_tokens(recipe.encoder.num_tokens, num_images, index, len(recipe.views))]
        )
    return np.concatenate(parts, axis=1)


def _chosen_tokens(num_tokens: int, num_images: int, view: int, num_views: int) -> NDArray[np.int64]:
    """Evenly spread tokens, so many that all images in all views together give `_NUM_VALUES`.

    Views show much the same image: each gives other tokens.
    """
    share = min(num_tokens, max(1, _NUM_VALUES // (num_images * num_views)))
    first = view * num_tokens // (share * num_views)
    return (np.arange(share) * num_tokens // share + first) % num_tokens
