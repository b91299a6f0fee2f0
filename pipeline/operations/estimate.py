"""`pipeline estimate`: bytes and hours of a planned store or training run, each with its formula."""

import dataclasses
import json
from dataclasses import dataclass

from pipeline.console import show
from pipeline.settings.config import PIXELS_PER_TOKEN, StoreConfig
from pipeline.settings.operations import EstimateConfig
from shards import EncoderIdentity, Recipe, UsageError
from shards.metadata.layout import Field, fields_of
from shards.metadata.root import read_recipe
from shards.writing.revisions import newest_revision

_DEFAULT_SHARDS = 1024
_INDEX_ENTRY, _INDEX_CHECKSUM = 16, 4  # bytes a row and a shard of the zarr format's index


@dataclass(frozen=True)
class Figure:
    """One number and how it comes about.

    Attributes:
        name: What it is.
        formula: The calculation in words and numbers.
        value: Its result, in `unit`.
        unit: bytes, bytes/s, hours, steps or samples.
    """

    name: str
    formula: str
    value: float
    unit: str


def estimate(config: EstimateConfig) -> None:
    """Print what is planned and the space and time it takes.

    Raises:
        UsageError: If something needed is neither given nor in a store, or makes no sense.
    """
    _require_positive(config)
    recipe = planned_recipe(config)
    figures = [*store_figures(recipe), *_encoding_figures(config, recipe), *_training_figures(config, recipe)]
    if config.json:
        text = json.dumps([dataclasses.asdict(figure) for figure in figures], indent=1, ensure_ascii=False)
    else:
        text = "\n".join([*(_line(figure) for figure in figures), *_missing(config)])
    show(text)


def planned_recipe(config: EstimateConfig) -> Recipe:
    """Return the recipe of the planned store: what is given, and for the rest the named store's."""
    if config.store is not None:
        base = read_recipe(config.store, newest_revision(config.store))
    elif config.rows is None:
        raise UsageError("an estimate needs images to count; give --rows, or a store")
    else:
        base = _new_recipe(config, config.rows)
    if config.dtype not in (None, base.dtype):
        # Another storage type goes without the int8 code of the store's own.
        base = dataclasses.replace(base, dtype=config.dtype, code=None, calibration_rows=0, code_error=0.0)
    h, w, width = _token_shape(config, base)
    same_grid = (h, w) == base.encoder.grid
    image_size = base.image_size if same_grid else min(base.image_size, 1) * PIXELS_PER_TOKEN * h
    if config.latents is not None:
        image_size = 0  # a derived field's images are links to the store's
    rows = config.rows or base.num_images
    return dataclasses.replace(
        base,
        encoder=dataclasses.replace(base.encoder, grid=(h, w), width=width),
        num_images=rows,
        num_shards=config.shards or min(base.num_shards, rows),
        views=_views(config.views) or base.views,
        image_size=image_size if config.image_size is None else config.image_size,
    )


def store_figures(recipe: Recipe) -> list[Figure]:
    """Return the bytes of the store that a recipe describes, without compression."""
    fields = [field for view in recipe.views for field in fields_of(recipe, view)]
    tokens = [field for field in fields if field.name == "tokens"]
    images = [field for field in fields if field.name == "image"]
    parts = [_array_figure("tokens", recipe, tokens)]
    if images:
        parts.append(_array_figure("images", recipe, images))
    if class_tokens := [field for field in fields if field.name == "cls"]:
        parts.append(_array_figure("class tokens", recipe, class_tokens))
    index = len(fields) * recipe.num_shards * (recipe.capacity * _INDEX_ENTRY + _INDEX_CHECKSUM)
    rule = (
        f"{len(fields)} arrays × {recipe.num_shards:,} shards × "
        f"({recipe.capacity:,} rows × {_INDEX_ENTRY} + {_INDEX_CHECKSUM} bytes)"
    )
    parts.append(Figure("index", rule, index, "bytes"))
    row = max(field.row_nbytes for field in fields)
    return [
        *parts,
        Figure("store", " + ".join(part.name for part in parts), sum(part.value for part in parts), "bytes"),
        Figure(
            "shard",
            f"{recipe.capacity:,} rows × {row:,} bytes, largest object",
            recipe.capacity * row,
            "bytes",
        ),
    ]


def _array_figure(name: str, recipe: Recipe, fields: list[Field]) -> Figure:
    shape = " × ".join(str(side) for side in fields[0].row_shape)
    stored = fields[0].dtype
    views = f"{len(fields)} view" + ("s" if len(fields) > 1 else "")
    rule = (
        f"{recipe.num_images:,} rows × {views} × {shape} × {stored.numpy.itemsize} bytes ({stored.logical})"
    )
    return Figure(name, rule, recipe.num_images * sum(field.row_nbytes for field in fields), "bytes")


def _encoding_figures(config: EstimateConfig, recipe: Recipe) -> list[Figure]:
    rate = config.images_per_second
    if rate is None:
        return []
    rule = f"{recipe.num_images:,} rows / ({rate:g} images/s × {config.devices} devices)"
    written = (
        rate
        * config.devices
        * sum(field.row_nbytes for view in recipe.views for field in fields_of(recipe, view))
    )
    return [
        Figure("encoding", rule, recipe.num_images / rate / config.devices / 3600, "hours"),
        Figure("writing", "images/s × devices × bytes of a row in all views", written, "bytes/s"),
    ]


def _training_figures(config: EstimateConfig, recipe: Recipe) -> list[Figure]:
    if config.epochs is None:
        return []
    samples = config.epochs * recipe.num_images
    steps = samples / config.batch_size
    figures = [
        Figure("samples", f"{config.epochs:g} epochs × {recipe.num_images:,} rows", samples, "samples"),
        Figure("steps", f"{samples:,.0f} samples / global batch {config.batch_size:,}", steps, "steps"),
    ]
    rate = config.samples_per_second
    if rate is None:
        return figures
    rule = f"{samples:,.0f} samples / ({rate:g} samples/s × {config.devices} devices)"
    row = fields_of(recipe, recipe.views[0])[0].row_nbytes
    reading = f"{rate:g} samples/s × {config.devices} devices × {row:,} bytes of tokens"
    return [
        *figures,
        Figure("training", rule, samples / rate / config.devices / 3600, "hours"),
        Figure("reading", reading, rate * config.devices * row, "bytes/s"),
    ]


def _new_recipe(config: EstimateConfig, rows: int) -> Recipe:
    """Return a recipe with the defaults of `pipeline encode`; of its encoder only the shape of the tokens is known."""
    h, w, width = _token_shape(config, None)
    encoder = EncoderIdentity(
        name="planned",
        weights="",
        weights_digest="",
        preprocessing={},
        input_size=1,
        grid=(h, w),
        width=width,
        prefix_tokens=0,
        final_norm="",
    )
    return Recipe(
        encoder=encoder,
        source_digest="",
        num_images=rows,
        num_shards=min(_DEFAULT_SHARDS, rows),
        seed=0,
        views=StoreConfig(shards=1).view_names(),
        image_size=PIXELS_PER_TOKEN * h,
    )


def _token_shape(config: EstimateConfig, base: Recipe | None) -> tuple[int, int, int]:
    """Return token rows, columns and channels."""
    if config.latents is not None:
        return (1, *_latents(config.latents))
    shape = None if base is None else (*base.encoder.grid, base.encoder.width)
    if config.encoder is not None:
        from pipeline.encoders.encoder import token_shape

        shape = token_shape(config.encoder, input_size=config.input_size)
    elif config.input_size is not None:
        raise UsageError("--input-size is the encoder's; give --encoder too, or --grid instead")
    if shape is None and (config.grid is None or config.width is None):
        raise UsageError(
            "the size of a row follows from its tokens; give --encoder, or --grid and --width, or a store"
        )
    h, w, width = shape or (0, 0, 0)
    return config.grid or h, config.grid or w, config.width or width


def _latents(text: str) -> tuple[int, int]:
    """Parse number and width of latents, such as 32x128.

    Raises:
        UsageError: If they are no two positive numbers.
    """
    count, _, width = text.partition("x")
    if not (count.isdecimal() and width.isdecimal() and int(count) and int(width)):
        raise UsageError(f"--latents takes number and width of the latents, got {text!r}; such as 32x128")
    return int(count), int(width)


def _views(text: str | None) -> tuple[str, ...]:
    return () if text is None else StoreConfig(shards=1, views=text).view_names()


def _require_positive(config: EstimateConfig) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and field.name != "image_size"
            and value <= 0
        ):
            raise UsageError(f"--{field.name.replace('_', '-')} must be more than 0, got {value:g}")


def _missing(config: EstimateConfig) -> list[str]:
    """List the further estimates that are possible and the options that give them."""
    hints = []
    if config.images_per_second is None:
        hints.append(
            "hours of encoding: give --images-per-second, which `pipeline encode --dry-run` measures"
        )
    if config.epochs is None or config.samples_per_second is None:
        hints.append(
            "hours of training: give --epochs, --batch-size and --samples-per-second, which the trainer's line says"
        )
    return hints


def _line(figure: Figure) -> str:
    return f"{figure.name:<10} {figure.formula} = {_readable(figure)}"


def _readable(figure: Figure) -> str:
    if figure.unit in ("bytes", "bytes/s"):
        for name, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
            if figure.value >= size:
                return f"{figure.value / size:,.4g} {name}{figure.unit.removeprefix('bytes')}"
    return (
        f"{figure.value:,.4g} {figure.unit}"
        if figure.unit == "hours"
        else f"{figure.value:,.0f} {figure.unit}"
    )
