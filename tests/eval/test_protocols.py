"""Published protocols, the plan made of settings, warnings about numbers, and the table of results."""

from dataclasses import replace
from pathlib import Path

import pytest

from eval.generate.plan import plan_of
from eval.metrics.cautions import generation_cautions, reconstruction_cautions, require_published_size
from eval.metrics.results import markdown_table
from eval.protocols import PROTOCOLS
from eval.settings import GenerationSettings
from shards.errors import UsageError


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("dit", "decoder", "guide"):
        Path(name).touch()
    Path("data").mkdir()
    Path("data/VIRTUAL_imagenet256_labeled.npz").touch()
    return GenerationSettings(snapshot=Path("dit"), decoder=Path("decoder"))


def test_without_a_protocol_the_defaults_are_small_and_unguided(settings):
    plan = plan_of(settings)
    assert (plan.num, plan.labels, plan.kind, plan.points, plan.method) == (
        64,
        "equal",
        "published",
        50,
        "euler",
    )
    assert (plan.guidance, plan.guidance_scale, plan.reference) == ("none", 1.0, None)


def test_the_guided_protocol_is_the_published_one(settings):
    plan = plan_of(replace(settings, protocol="imagenet256-guided", guide=Path("guide")))
    assert (plan.num, plan.labels, plan.points, plan.method) == (50_000, "equal", 50, "euler")
    assert (plan.guidance, plan.guidance_scale) == ("autoguidance", 1.42)
    assert plan.metrics == ("fid", "sfid", "is", "precision_recall")
    assert plan.reference == Path("data/VIRTUAL_imagenet256_labeled.npz")
    assert plan.deviations == ()


def test_what_differs_from_the_protocol_is_named(settings):
    other = Path("other.npz")
    other.touch()
    plan = plan_of(
        replace(settings, protocol="imagenet256-unguided", num_samples=100, precision="bf16", reference=other)
    )
    assert plan.num == 100
    assert plan.deviations == (
        "num samples 100 instead of 50000",
        "reference other.npz instead of VIRTUAL_imagenet256_labeled.npz",
        "precision bf16 instead of fp32 or tf32",
    )


def test_what_a_protocol_fixes_and_the_user_repeats_is_no_deviation(settings):
    plan = plan_of(
        replace(settings, protocol="imagenet256-unguided", num_samples=50_000, points=50, labels="equal")
    )
    assert plan.deviations == ()


def test_the_sampler_that_ends_at_data_has_one_point_more(settings):
    plan = plan_of(replace(settings, sampler="euler-50-to-zero"))
    assert (plan.kind, plan.points) == ("to-zero", 51)


def test_a_protocol_is_refused_for_another_resolution():
    require_published_size("imagenet256-guided", (256, 256))
    require_published_size(None, (64, 64))
    with pytest.raises(UsageError, match="is for 512×512 images, the decoder makes 256×256"):
        require_published_size("imagenet512-guided", (256, 256))


@pytest.mark.parametrize(("count", "said"), [(1000, "no full rank"), (10_000, "larger than that of 50000")])
def test_too_few_samples_are_warned_about(count, said):
    warnings = generation_cautions(count, "statistics", None, None, "x.npz")
    assert len(warnings) == 1
    assert said in warnings[0]


def test_the_published_comparison_needs_no_warning():
    name = PROTOCOLS["imagenet256-guided"].reference_name
    assert generation_cautions(50_000, "statistics", None, "imagenet256-guided", name) == []
    assert reconstruction_cautions(50_000, None, None) == []


def test_a_wrong_reference_is_warned_about():
    assert "another number" in generation_cautions(50_000, "folder", 50_000, "imagenet256-guided", "val")[0]
    assert "folder of 900 images" in generation_cautions(50_000, "folder", 900, None, "val")[0]
    assert "validation images" in reconstruction_cautions(50_000, "statistics", None)[0]
    assert "with 10 other images" in reconstruction_cautions(50_000, "folder", 10)[0]


def test_the_table_puts_our_row_below_the_published_ones():
    published = PROTOCOLS["imagenet256-guided"].published
    table = markdown_table(published, "mine", {"fid": 1.234, "is": 260.04, "precision": 0.781}, "this run")
    lines = table.splitlines()
    assert len(lines) == 2 + len(published) + 1
    assert all(line.count("|") == 7 for line in lines)
    assert (
        "| RAE DiT-DH-XL, 800 epochs | 1.13 | 262.6 | 0.78 | 0.67 | arXiv 2510.11690, system comparison |"
        in lines
    )
    assert lines[-1] == "| **mine** | 1.23 | 260.0 | 0.78 | – | this run |"
