"""The stores that one pass of the encoder fills: the one asked for, and companion fields of it from other blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from pipeline.encode.tokens import TokenStorage
from pipeline.encoders.aggregation import Aggregation
from pipeline.encoders.frozen import Encoder, EncoderOutput
from pipeline.encoders.latents import RowEncoder
from pipeline.settings.config import EncodeConfig
from shards import CommitRecord, Location, StoreWriter
from shards.metadata.layout import commit_path
from shards.storage.location import read_object
from shards.writing.added_fields import field_path, link_image, why_not_linked


def companion_paths(config: EncodeConfig) -> dict[str, Location]:
    """Return where each companion field lies, by name."""
    return {name: field_path(config.store.out, name) for name in config.companions()}


def companion_encoders(config: EncodeConfig, encoder: RowEncoder) -> dict[str, Encoder]:
    """Return the encoder of each companion field, by name; all share one network.

    Raises:
        UsageError: If the network has no such blocks.
    """
    if not isinstance(encoder, Encoder):
        return {}
    return {
        name: encoder.of_blocks(layers, combination, f"--also {name}")
        for name, (layers, combination) in config.companions().items()
    }


@dataclass(frozen=True)
class Target:
    """One store that is filled.

    Attributes:
        writer: It.
        aggregation: The blocks its tokens come from; None takes the encoder's own.
        images_of: The store whose images it shares as further names of the same files; None has its own.
    """

    writer: StoreWriter
    aggregation: Aggregation | None = None
    images_of: StoreWriter | None = None

    @property
    def storage(self) -> TokenStorage:
        """What brings tokens into its storage type."""
        return TokenStorage(self.writer.recipe.dtype, self.writer.code)

    def lacks(self, view: str, shard: int) -> bool:
        """Return whether a shard of a view is still to be written."""
        known = view in self.writer.recipe.views
        return known and not (self.writer.path / commit_path(view, shard)).exists()

    def linked(self, view: str, shard: int) -> Callable[[], CommitRecord] | None:
        """See `StoreWriter.shard`; the store whose images are shared must have published the shard by then."""
        store = self.images_of
        if store is None or "image" not in self.writer.recipe.fields(view):
            return None

        def link() -> CommitRecord:
            link_image(store.path, store.recipe, self.writer.path, view, shard)
            path = store.path / commit_path(view, shard)
            record = CommitRecord.from_bytes(read_object(path), path=path)
            record.require_fits(store.recipe, path=path)
            return record

        return link


def outputs(encoder: RowEncoder, inputs: Tensor, targets: Sequence[Target]) -> list[EncoderOutput]:
    """Compute what each target stores of some rows, in one pass of the network."""
    if not isinstance(encoder, Encoder):
        return [EncoderOutput(encoder.encode(inputs), None) for _ in targets]
    aggregations = [target.aggregation or encoder.aggregation for target in targets]
    return encoder.encode_all(inputs, aggregations, class_token=targets[0].writer.recipe.class_token)


def open_targets(
    config: EncodeConfig, writer: StoreWriter, encoder: RowEncoder, builder: str
) -> list[Target]:
    """Return the targets of a run whose stores have been begun; the store asked for is the first.

    Args:
        config: Settings of the run.
        writer: The store asked for.
        encoder: Its encoder.
        builder: Who has built the encoder, for messages.

    Raises:
        IdentityMismatchError: If a store was begun with another encoder.
    """
    writer.recipe.encoder.require_same(encoder.identity, what=f"the encoder built by {builder}")
    targets = [Target(writer)]
    for name, companion in companion_encoders(config, encoder).items():
        path = companion_paths(config)[name]
        field = StoreWriter.open(path)
        what = f"the encoder of field {name} built by {builder}"
        field.recipe.encoder.require_same(companion.identity, what=what)
        shared = writer.recipe.image_size > 0 and why_not_linked(writer.path, writer.recipe, path) is None
        targets.append(Target(field, companion.aggregation, writer if shared else None))
    return targets


def pending_in_any(writers: Sequence[StoreWriter]) -> list[tuple[str, int]]:
    """Return the (view, shard) pairs that some store lacks, each once, in order of shard."""
    found = {pair for writer in writers for pair in writer.pending()}
    views = writers[0].recipe.views
    return sorted(found, key=lambda pair: (pair[1], views.index(pair[0])))
