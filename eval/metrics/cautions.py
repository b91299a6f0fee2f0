"""When a number is not what its name makes people think: small samples and other references. No torch."""

from __future__ import annotations

from eval.protocols import PROTOCOLS
from eval.settings import ProtocolName
from shards import UsageError

PUBLISHED_COUNT = 50_000
"""Samples behind published scores. Source: arXiv 1706.08500 and every table since."""
INCEPTION_WIDTH = 2048


def sample_cautions(count: int, what: str) -> list[str]:
    """Return warnings about a Fréchet distance of `count` images."""
    if count <= INCEPTION_WIDTH:
        return [
            f"{what} of {count} images: no more images than the {INCEPTION_WIDTH} features, so the covariance has "
            "no full rank and the distance is far too large; use it to compare runs with the same count only"
        ]
    if count < PUBLISHED_COUNT:
        return [
            f"{what} of {count} images is larger than that of {PUBLISHED_COUNT}, which published tables report; "
            f"compare it only with numbers of {count} images"
        ]
    return []


def generation_cautions(
    count: int, reference_kind: str, reference_count: int | None, protocol: ProtocolName | None, name: str
) -> list[str]:
    """Return warnings about gFID: `reference_kind` is folder, store, samples or statistics."""
    found = sample_cautions(count, "gFID")
    if protocol is not None:
        found += PROTOCOLS[protocol].cautions
    if protocol is not None and name != PROTOCOLS[protocol].reference_name:
        found.append(
            f"published gFID compares with {PROTOCOLS[protocol].reference_name}, statistics of the training "
            f"images; against {name} it is another number"
        )
    elif reference_kind != "statistics":
        found.append(
            f"published gFID compares with statistics of all training images; this one compares with a "
            f"{reference_kind} of {reference_count} images"
        )
    return found


def reconstruction_cautions(count: int, reference_kind: str | None, reference_count: int | None) -> list[str]:
    """Return warnings about rFID; `reference_kind` is None where the originals themselves are the reference."""
    found = sample_cautions(count, "rFID")
    if reference_kind == "statistics":
        found.append(
            "published rFID compares reconstructions of the validation images with those images; statistics of "
            "the training images give about 1.2 more: leave out --reference to compare with the originals"
        )
    elif reference_kind is not None and reference_count != count:
        found.append(
            f"rFID compares {count} reconstructions with {reference_count} other images; leave out --reference to "
            "compare with the originals"
        )
    return found


def require_published_size(protocol: ProtocolName | None, image_size: tuple[int, int]) -> None:
    """Refuse a protocol for another resolution.

    Raises:
        UsageError: The decoder makes images of another size.
    """
    if protocol is None:
        return
    side = PROTOCOLS[protocol].image_size
    if image_size != (side, side):
        found = "×".join(map(str, image_size))
        raise UsageError(f"protocol {protocol} is for {side}×{side} images, the decoder makes {found}")
