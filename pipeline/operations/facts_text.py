"""The facts of a store as lines for people."""

import statistics
from typing import Any

from shards import printable_text


def as_text(facts: dict[str, Any]) -> str:
    """Format what `pipeline.operations.facts.store_facts` returns, a line each."""
    lines = _recipe_lines(facts)
    if facts["complete"]:
        lines += _finished_lines(facts)
    else:
        lines.append(f"state      unfinished, {facts['bytes']:,} bytes in shards so far")
        lines += _work_lines(facts)
    if "next_revision" in facts:
        coming = facts["next_revision"]
        lines += [f"next       revision {coming['revision']} is being written", *_work_lines(coming)]
    if facts.get("fields"):
        lines.append(
            "fields     " + ", ".join(f"{name} (encoder {id_})" for name, id_ in facts["fields"].items())
        )
    given = facts["statistics_from_file"]
    if given is not None:
        lines.append(f"statistics readers normalise by {given['name']}, SHA-256 {given['sha256']}")
    lines += [
        f"rate       {view}: {statistics.median(rates):.0f} rows/s a shard ({min(rates):.0f} to {max(rates):.0f})"
        for view, rates in facts["rows_a_second"].items()
        if rates
    ]
    lines += [f"unusable   {image['key']}: {image['reason']}" for image in facts["unusable_images"]]
    return "\n".join(printable_text(line) for line in lines)


def _recipe_lines(facts: dict[str, Any]) -> list[str]:
    recipe = facts["recipe"]
    encoder = recipe["encoder"]
    grid = "×".join(str(side) for side in encoder["grid"])
    trained = "" if facts["trained_encoder"] else "  (NOT TRAINED: for trying things out, not for results)"
    return [
        f"store      {facts['store']}",
        f"encoder    {encoder['name']}, weights {encoder['weights']}{trained}",
        f"           input {encoder['input_size']} px, {grid} tokens of {encoder['width']}, "
        f"{aggregation_text(encoder)}{encoder['final_norm']}",
        f"recipe     {recipe['num_images']} images, {recipe['num_shards']} shards, views {', '.join(recipe['views'])}, "
        f"{recipe['dtype']} computed in {recipe['precision']}, images of {recipe['image_size']} px, {recipe['format']}",
        *(
            f"extended   from {was['num_images']} images in {was['num_shards']} shards"
            for was in recipe.get("earlier", ())
        ),
        f"ids        encoder {facts['encoder_id']}, recipe {facts['recipe_id']}",
        "row        " + ", ".join(f"{name} {size:,} bytes" for name, size in facts["row_bytes"].items()),
    ]


def aggregation_text(encoder: dict[str, Any]) -> str:
    """Return the blocks that tokens are combined from, with a comma behind; empty for the last one alone."""
    found = encoder.get("aggregation")
    return f"{found['combination']} of blocks {' '.join(map(str, found['layers']))}, " if found else ""


def _finished_lines(facts: dict[str, Any]) -> list[str]:
    lines = [
        f"state      complete, {facts['objects']} objects, {facts['bytes']:,} bytes"
        + (f", revision {facts['revision']}" if facts["revision"] else ""),
        f"rows       {facts['rows']} of {facts['images']} images, {facts['unusable']} unusable, "
        f"{facts['classes']} classes",
        "sizes      " + ", ".join(f"{name} {size:,}" for name, size in facts["bytes_by_part"].items()),
    ]
    lines += [
        f"statistics {view}: {values['count']} rows, mean {values['mean']:+.4f}, variance {values['variance']:.4f}, "
        f"by channel {values['channel_variance_min']:.4g} to {values['channel_variance_max']:.4g}"
        for view, values in facts["statistics"].items()
    ]
    lines += [
        f"left out   {nbytes:,} bytes of {uri}, which could not be read"
        for uri, nbytes in facts["source_bytes_left_out"].items()
    ]
    lines += [f"made with  {name} {value}" for name, value in facts["provenance"].items()]
    for view, values in facts["int8_error"].items():
        worst = ", ".join(f"{channel} {error:.2%}" for channel, error in values["worst_channels"].items())
        lines.append(
            f"int8 error {view}: {values['median']:.2%} of a channel's standard deviation (median), at most "
            f"{values['largest']:.2%}; worst channels {worst}"
        )
    return lines


def work_done(facts: dict[str, Any]) -> str:
    """Return how far an unfinished store is: a shard is written once for each view, and counted so."""
    done, pending, views = facts["shards_done"], facts["shards_pending"], len(facts["rows_by_view"])
    total = done + pending
    return f"{done:,} of {total:,} done, {pending:,} to come ({total // views:,} shards × {views} views)"


def _work_lines(facts: dict[str, Any]) -> list[str]:
    rows = ", ".join(f"{view} {count}" for view, count in facts["rows_by_view"].items())
    return [
        f"shards     {work_done(facts)}",
        f"rows       {rows} of {facts['images']} images so far, {facts['unusable']} unusable, "
        f"{facts['classes']} classes",
        *(f"failed     shard {shard}: {reason}" for shard, reason in facts["failed_shards"].items()),
    ]
