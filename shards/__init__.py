"""The store of latents: what other packages and other people's trainers use of it.

A name is loaded when it is first asked for, so that importing this package costs nothing; none of them loads torch.
Names that are not listed here are internal. docs/api.md has the arguments of those that other programs need. By task:

- Read a store: open_store, is_store, Store, RowReader, Manifest, Statistics, MixedStore, Phase, range_cache,
  bad_rows, sample_stored, chosen_tokens, MIRRORED_VIEWS, NO_LABEL, Positions
- Feed a trainer: Loader, Batch, SampleDataset, StreamBatchSampler, webdataset_pipeline
- Write a store: StoreWriter, ShardWriter, Plan, SourceRecord, Recipe, FormatName, EncoderIdentity, CompressorIdentity,
  Execution, CommitRecord, ArchiveIdentity, continued_plan, row_codec, stale_temporaries, try_writing
- Statistics and storage types: Moments, RowSums, moments_of_sums, collapsed_share, GivenStatistics, given_source,
  publish_given, read_statistics_file, TOKEN_DTYPES, storage_type, to_storage, to_float64
- int8: Int8Code, published_code, fit_and_judge, describe_error, require_within
- Check a store: verify_store, Problem, withdraw_damaged, withdraw_repaired
- Find and decode images: find_images, FoundImage, SourceKind, SourceOptions, SourceReader, SourceRoots,
  BadImageError, answers_of, united_classes, decode_image, center_crop, random_crops, LARGEST_IMAGE
- Folders, servers and files: Location, RemotePath, as_location, beside, refuse_credentials, publish_bytes,
  replace_atomically, replacing, fsync_dir, FolderLock, read_document
- Commands: run_command, require_output_folder, printable_text, usable_cores
- Order and random draws: permutation, even_spread
- Errors: UserError, UsageError, StoreError, StoreDamagedError, StoreIncompleteError, IdentityMismatchError,
  SourceDamagedError, UndecodableImageError, RemoteError
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shards.command_line import require_output_folder as require_output_folder
    from shards.command_line import run_command as run_command
    from shards.cores import usable_cores as usable_cores
    from shards.documents import read_document as read_document
    from shards.draws import even_spread as even_spread
    from shards.draws import permutation as permutation
    from shards.errors import IdentityMismatchError as IdentityMismatchError
    from shards.errors import SourceDamagedError as SourceDamagedError
    from shards.errors import StoreDamagedError as StoreDamagedError
    from shards.errors import StoreError as StoreError
    from shards.errors import StoreIncompleteError as StoreIncompleteError
    from shards.errors import UndecodableImageError as UndecodableImageError
    from shards.errors import UsageError as UsageError
    from shards.errors import UserError as UserError
    from shards.errors import printable_text as printable_text
    from shards.images import LARGEST_IMAGE as LARGEST_IMAGE
    from shards.images import center_crop as center_crop
    from shards.images import decode_image as decode_image
    from shards.images import random_crops as random_crops
    from shards.integrity.problem import Problem as Problem
    from shards.integrity.verify import verify_store as verify_store
    from shards.integrity.withdrawal import withdraw_damaged as withdraw_damaged
    from shards.integrity.withdrawal import withdraw_repaired as withdraw_repaired
    from shards.metadata.archives import ArchiveIdentity as ArchiveIdentity
    from shards.metadata.class_names import answers_of as answers_of
    from shards.metadata.class_names import united_classes as united_classes
    from shards.metadata.code_table import published_code as published_code
    from shards.metadata.commit import CommitRecord as CommitRecord
    from shards.metadata.compression import row_codec as row_codec
    from shards.metadata.identity import MIRRORED_VIEWS as MIRRORED_VIEWS
    from shards.metadata.identity import CompressorIdentity as CompressorIdentity
    from shards.metadata.identity import EncoderIdentity as EncoderIdentity
    from shards.metadata.identity import Execution as Execution
    from shards.metadata.identity import FormatName as FormatName
    from shards.metadata.identity import Recipe as Recipe
    from shards.metadata.index import bad_rows as bad_rows
    from shards.metadata.manifest import Manifest as Manifest
    from shards.metadata.plan import NO_LABEL as NO_LABEL
    from shards.metadata.plan import Plan as Plan
    from shards.metadata.plan import SourceRecord as SourceRecord
    from shards.metadata.repaired import continued_plan as continued_plan
    from shards.metadata.root import is_store as is_store
    from shards.metadata.token_statistics import GivenStatistics as GivenStatistics
    from shards.metadata.token_statistics import Statistics as Statistics
    from shards.metadata.token_statistics import collapsed_share as collapsed_share
    from shards.metadata.token_statistics import given_source as given_source
    from shards.metadata.token_statistics import publish_given as publish_given
    from shards.reading.dataset import SampleDataset as SampleDataset
    from shards.reading.dataset import StreamBatchSampler as StreamBatchSampler
    from shards.reading.loader import Batch as Batch
    from shards.reading.loader import Loader as Loader
    from shards.reading.mixed_store import MixedStore as MixedStore
    from shards.reading.mixture import Phase as Phase
    from shards.reading.reader import RowReader as RowReader
    from shards.reading.store import Store as Store
    from shards.reading.store import open_store as open_store
    from shards.reading.token_sample import chosen_tokens as chosen_tokens
    from shards.reading.token_sample import sample_stored as sample_stored
    from shards.reading.webdataset_pipeline import webdataset_pipeline as webdataset_pipeline
    from shards.sources.find import find_images as find_images
    from shards.sources.found import FoundImage as FoundImage
    from shards.sources.found import SourceKind as SourceKind
    from shards.sources.found import SourceOptions as SourceOptions
    from shards.sources.reading import BadImageError as BadImageError
    from shards.sources.reading import SourceReader as SourceReader
    from shards.sources.roots import SourceRoots as SourceRoots
    from shards.storage.atomic import fsync_dir as fsync_dir
    from shards.storage.atomic import replacing as replacing
    from shards.storage.location import Location as Location
    from shards.storage.location import as_location as as_location
    from shards.storage.location import beside as beside
    from shards.storage.location import publish_bytes as publish_bytes
    from shards.storage.location import replace_atomically as replace_atomically
    from shards.storage.lock import FolderLock as FolderLock
    from shards.storage.range_cache import range_cache as range_cache
    from shards.storage.remote_calls import RemoteError as RemoteError
    from shards.storage.remote_path import RemotePath as RemotePath
    from shards.storage.remote_path import refuse_credentials as refuse_credentials
    from shards.values.code_error import describe_error as describe_error
    from shards.values.code_error import fit_and_judge as fit_and_judge
    from shards.values.code_error import require_within as require_within
    from shards.values.dtypes import TOKEN_DTYPES as TOKEN_DTYPES
    from shards.values.dtypes import storage_type as storage_type
    from shards.values.dtypes import to_float64 as to_float64
    from shards.values.dtypes import to_storage as to_storage
    from shards.values.moments import Moments as Moments
    from shards.values.moments import RowSums as RowSums
    from shards.values.moments import moments_of_sums as moments_of_sums
    from shards.values.positions import Positions as Positions
    from shards.values.quantize import Int8Code as Int8Code
    from shards.values.statistics_file import read_statistics_file as read_statistics_file
    from shards.writing.shard_writer import ShardWriter as ShardWriter
    from shards.writing.store_writer import StoreWriter as StoreWriter
    from shards.writing.store_writer import stale_temporaries as stale_temporaries
    from shards.writing.trial import try_writing as try_writing

_MODULES = {
    "shards.command_line": ["require_output_folder", "run_command"],
    "shards.cores": ["usable_cores"],
    "shards.documents": ["read_document"],
    "shards.draws": ["even_spread", "permutation"],
    "shards.errors": [
        "IdentityMismatchError",
        "SourceDamagedError",
        "StoreDamagedError",
        "StoreError",
        "StoreIncompleteError",
        "UndecodableImageError",
        "UsageError",
        "UserError",
        "printable_text",
    ],
    "shards.images": ["LARGEST_IMAGE", "center_crop", "decode_image", "random_crops"],
    "shards.integrity.problem": ["Problem"],
    "shards.integrity.verify": ["verify_store"],
    "shards.integrity.withdrawal": ["withdraw_damaged", "withdraw_repaired"],
    "shards.metadata.archives": ["ArchiveIdentity"],
    "shards.metadata.code_table": ["published_code"],
    "shards.metadata.class_names": ["answers_of", "united_classes"],
    "shards.metadata.commit": ["CommitRecord"],
    "shards.metadata.compression": ["row_codec"],
    "shards.metadata.identity": [
        "CompressorIdentity",
        "EncoderIdentity",
        "MIRRORED_VIEWS",
        "Execution",
        "FormatName",
        "Recipe",
    ],
    "shards.metadata.index": ["bad_rows"],
    "shards.metadata.manifest": ["Manifest"],
    "shards.metadata.repaired": ["continued_plan"],
    "shards.metadata.plan": ["NO_LABEL", "Plan", "SourceRecord"],
    "shards.metadata.root": ["is_store"],
    "shards.metadata.token_statistics": [
        "GivenStatistics",
        "Statistics",
        "collapsed_share",
        "given_source",
        "publish_given",
    ],
    "shards.reading.dataset": ["SampleDataset", "StreamBatchSampler"],
    "shards.reading.loader": ["Batch", "Loader"],
    "shards.reading.mixed_store": ["MixedStore"],
    "shards.reading.mixture": ["Phase"],
    "shards.reading.reader": ["RowReader"],
    "shards.reading.store": ["Store", "open_store"],
    "shards.reading.token_sample": ["chosen_tokens", "sample_stored"],
    "shards.reading.webdataset_pipeline": ["webdataset_pipeline"],
    "shards.sources.find": ["find_images"],
    "shards.sources.found": ["FoundImage", "SourceKind", "SourceOptions"],
    "shards.sources.reading": ["BadImageError", "SourceReader"],
    "shards.sources.roots": ["SourceRoots"],
    "shards.storage.atomic": ["fsync_dir", "replacing"],
    "shards.storage.location": ["Location", "as_location", "beside", "publish_bytes", "replace_atomically"],
    "shards.storage.lock": ["FolderLock"],
    "shards.storage.range_cache": ["range_cache"],
    "shards.storage.remote_calls": ["RemoteError"],
    "shards.storage.remote_path": ["RemotePath", "refuse_credentials"],
    "shards.values.code_error": ["describe_error", "fit_and_judge", "require_within"],
    "shards.values.dtypes": ["TOKEN_DTYPES", "storage_type", "to_float64", "to_storage"],
    "shards.values.moments": ["Moments", "RowSums", "moments_of_sums"],
    "shards.values.positions": ["Positions"],
    "shards.values.quantize": ["Int8Code"],
    "shards.values.statistics_file": ["read_statistics_file"],
    "shards.writing.shard_writer": ["ShardWriter"],
    "shards.writing.store_writer": ["StoreWriter", "stale_temporaries"],
    "shards.writing.trial": ["try_writing"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
