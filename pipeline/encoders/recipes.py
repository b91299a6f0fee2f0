"""Named encoders: a network, the blocks its tokens come from, and how they are combined, in one word."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.encoders.aggregation import MEAN, WITH_SPATIAL_MEAN
from shards import UsageError


@dataclass(frozen=True, kw_only=True)
class NamedRecipe:
    """The encoder that a name selects.

    Attributes:
        model: timm name, with the tag `.raev2` where RAEv2's conventions are not RAE's.
        layers: Blocks, counted from 0; None takes the last.
        combination: How they are combined.
    """

    model: str
    layers: tuple[int, ...] | None = None
    combination: str = MEAN


_DINOV3_L = "vit_large_patch16_dinov3_qkvb.lvd1689m"

# Source: github:nanovisionx/RAEv2 at 8a0d238. K is the number of blocks; k7 takes every second one from 11, k23 all but
# the first, and k1 is the last without a spatial mean. Twelve-block networks take 2, 5, 8 and 11 by default, those of
# twenty-four 5, 11, 17 and 23.
RECIPES = {
    "raev2-dinov3-l-k1": NamedRecipe(model=_DINOV3_L),
    "raev2-dinov3-l-k7": NamedRecipe(
        model=_DINOV3_L, layers=(11, 13, 15, 17, 19, 21, 23), combination=WITH_SPATIAL_MEAN
    ),
    "raev2-dinov3-l-k23": NamedRecipe(
        model=_DINOV3_L, layers=tuple(range(1, 24)), combination=WITH_SPATIAL_MEAN
    ),
    "raev2-dinov2-b-k1": NamedRecipe(model="vit_base_patch14_reg4_dinov2.raev2"),
    "raev2-dinov2-b-k4": NamedRecipe(model="vit_base_patch14_reg4_dinov2.raev2", layers=(2, 5, 8, 11)),
    "raev2-dinov2-l-k1": NamedRecipe(model="vit_large_patch14_reg4_dinov2.raev2"),
    "raev2-dinov2-l-k4": NamedRecipe(model="vit_large_patch14_reg4_dinov2.raev2", layers=(5, 11, 17, 23)),
    "raev2-siglip2-b-k4": NamedRecipe(
        model="vit_base_patch16_siglip_256.raev2", layers=(2, 5, 8, 11), combination=WITH_SPATIAL_MEAN
    ),
    "raev2-siglip2-l-k4": NamedRecipe(
        model="vit_large_patch16_siglip_256.raev2", layers=(5, 11, 17, 23), combination=WITH_SPATIAL_MEAN
    ),
}


def resolve(
    name: str, layers: Sequence[int] | None, combination: str | None
) -> tuple[str, Sequence[int] | None, str | None]:
    """Return timm name, layers and combination of an encoder that may be named by a recipe.

    Raises:
        UsageError: If a recipe is named together with other layers, or with another combination.
    """
    recipe = RECIPES.get(name)
    if recipe is None:
        if name.startswith("raev2-"):
            raise UsageError(f"--encoder {name} is no recipe; the recipes are {', '.join(RECIPES)}")
        return name, layers, combination
    if layers is not None and tuple(layers) != recipe.layers:
        named = "the last block" if recipe.layers is None else ",".join(map(str, recipe.layers))
        raise UsageError(
            f"--encoder {name} names its layers, {named}, and --layers others; "
            f"use --encoder {recipe.model} with --layers"
        )
    if combination is not None and combination != recipe.combination:
        raise UsageError(
            f"--encoder {name} combines by {recipe.combination}, and --combination is {combination}; "
            f"use --encoder {recipe.model} with --layers and --combination"
        )
    return recipe.model, recipe.layers, recipe.combination
