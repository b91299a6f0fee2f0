"""A folder of this machine or a URL, as an argument of a command."""

from typing import Annotated

from tyro.constructors import PrimitiveConstructorSpec

from shards import Location, as_location

LocationArgument = Annotated[
    Location,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH|URL",
        instance_from_str=lambda words: as_location(words[0]),
        is_instance=lambda value: isinstance(value, Location),
        str_from_instance=lambda value: [str(value)],
    ),
]
