"""Generation end to end with tiny networks: numbered samples, continuation, pictures, metrics, refusals."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.generate.plan import plan_of
from eval.generate.run import generate as generate_by_plan
from eval.images.samples import SamplesFile, map_samples
from eval.settings import GenerationSettings
from shards.errors import IdentityMismatchError, UsageError, UserError

SCRIPT = Path(__file__).parents[2] / "eval" / "generation.py"


def generate(settings):
    return generate_by_plan(plan_of(settings))


@pytest.fixture
def settings(dit, decoder, tmp_path):
    return GenerationSettings(
        snapshot=dit, decoder=decoder, out=tmp_path / "out", num_samples=9, points=4, batch_size=4
    )


def _within_one_level(a, b):
    difference = np.abs(a.astype(int) - b.astype(int))
    return difference.max() <= 1


def test_generation_writes_samples_grid_and_results(settings):
    results = generate(settings)
    with np.load(settings.out / "samples.npz") as archive:
        images = archive["arr_0"]
    assert images.shape == (9, 16, 16, 3)
    assert images.dtype == np.uint8
    assert len(np.unique(images.reshape(9, -1), axis=0)) == 9
    assert json.loads((settings.out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["num"] == 9
    assert results["seed"] == 0
    assert {path.name for path in settings.out.glob("[!.]*")} == {
        "generation.json",
        "grid.png",
        "results.json",
        "samples.npz",
    }


def test_each_row_of_the_grid_shows_one_class_under_its_name(settings):
    generate(settings)
    images = map_samples(settings.out / "samples.npz")
    sheet = np.asarray(Image.open(settings.out / "grid.png"))
    margin = sheet.shape[1] - (3 * 18 + 2)
    assert margin > 10
    for row in range(3):
        for column in range(3):
            top, left = 2 + 18 * row, margin + 2 + 18 * column
            # With equal labels sample i shows class i modulo the number of classes.
            np.testing.assert_array_equal(sheet[top : top + 16, left : left + 16], images[row + 3 * column])


def test_samples_are_the_same_for_any_batch_size_and_number_of_samples(settings, tmp_path):
    generate(settings)
    other = replace(settings, out=tmp_path / "other", num_samples=11, batch_size=3)
    generate(other)
    one, more = map_samples(settings.out / "samples.npz"), map_samples(other.out / "samples.npz")
    assert _within_one_level(one, more[:9])


def test_another_seed_gives_other_samples(settings, tmp_path):
    generate(settings)
    other = replace(settings, out=tmp_path / "other", seed=1)
    generate(other)
    one, two = map_samples(settings.out / "samples.npz"), map_samples(other.out / "samples.npz")
    assert not _within_one_level(one, two)


def test_an_interrupted_generation_continues_where_it_stopped(settings, monkeypatch, tmp_path):
    generate(replace(settings, out=tmp_path / "whole"))
    written = []

    def write_and_stop(self, numbers, images, write=SamplesFile.write):
        if written:
            raise KeyboardInterrupt
        written.extend(numbers)
        write(self, numbers, images)

    with monkeypatch.context() as patch:
        patch.setattr(SamplesFile, "write", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            generate(settings)
    assert not (settings.out / "samples.npz").exists()
    results = generate(replace(settings, batch_size=2))
    assert results["sampled_now"] == 9 - len(written) == 5
    assert _within_one_level(
        map_samples(settings.out / "samples.npz"), map_samples(tmp_path / "whole" / "samples.npz")
    )


def test_a_finished_generation_is_not_made_again(settings):
    generate(settings)
    before = (settings.out / "samples.npz").stat().st_mtime_ns
    assert generate(settings)["sampled_now"] == 0
    assert (settings.out / "samples.npz").stat().st_mtime_ns == before


def test_a_folder_with_samples_of_other_settings_is_refused(settings):
    generate(settings)
    with pytest.raises(
        UserError, match=re.escape("other settings (points was 4 and is 5; seed was 0 and is 2)")
    ):
        generate(replace(settings, seed=2, points=5))


def test_random_labels_and_chosen_classes_change_the_samples(settings, tmp_path):
    found = {}
    for name, changes in {
        "equal": {},
        "random": {"labels": "random"},
        "one": {"classes": (2,)},
    }.items():
        out = tmp_path / name
        generate(replace(settings, out=out, **changes))
        found[name] = np.array(map_samples(out / "samples.npz"))
    assert not _within_one_level(found["equal"], found["random"])
    # Sample 2 shows class 2 in both.
    assert _within_one_level(found["equal"][2], found["one"][2])
    assert not _within_one_level(found["equal"][0], found["one"][0])


def test_a_class_that_does_not_exist_is_refused(settings):
    with pytest.raises(UsageError, match="0 to 2 for this snapshot, got 3"):
        generate(replace(settings, classes=(0, 3)))


def test_guidance_changes_the_samples_and_its_interval_limits_it(settings, write_dit, tmp_path):
    guide = write_dit(seed=1)
    variants = {
        "none": {},
        "cfg": {"guidance": "cfg", "guidance_scale": 3.0},
        "auto": {"guidance": "autoguidance", "guidance_scale": 3.0, "guide": guide},
        "at-the-end": {"guidance": "cfg", "guidance_scale": 3.0, "guidance_interval": (0.0, 1e-6)},
    }
    found = {}
    for name, changes in variants.items():
        out = tmp_path / name
        generate(replace(settings, out=out, **changes))
        found[name] = np.array(map_samples(out / "samples.npz"))
    assert not _within_one_level(found["none"], found["cfg"])
    assert not _within_one_level(found["none"], found["auto"])
    assert not _within_one_level(found["cfg"], found["auto"])
    assert _within_one_level(found["none"], found["at-the-end"])


def test_bf16_samples_stay_close_to_fp32_samples(settings, tmp_path):
    generate(settings)
    generate(replace(settings, out=tmp_path / "bf16", precision="bf16"))
    exact, rough = (np.array(map_samples(out / "samples.npz")) for out in (settings.out, tmp_path / "bf16"))
    assert not np.array_equal(exact, rough)
    assert np.abs(exact.astype(int) - rough.astype(int)).mean() < 3


def test_pngs_are_written_on_request(settings):
    generate(replace(settings, pngs=True))
    images = map_samples(settings.out / "samples.npz")
    found = sorted((settings.out / "png").iterdir())
    assert [path.name for path in found] == [f"{i:06}.png" for i in range(9)]
    np.testing.assert_array_equal(np.asarray(Image.open(found[4])), images[4])


def test_a_snapshot_trained_without_labels_is_sampled_without_one(settings, write_dit):
    unlabelled = write_dit(num_classes=1, class_names=())
    generate(replace(settings, snapshot=unlabelled))
    assert json.loads((settings.out / "results.json").read_text())["classes"] == [1]


def test_a_decoder_of_another_encoder_is_refused_with_the_difference(settings, write_decoder, encoder):
    other = write_decoder(encoder=replace(encoder, weights_digest="another"))
    with pytest.raises(IdentityMismatchError, match=r"decoder .* another encoder: weights"):
        generate(replace(settings, decoder=other))


def test_a_guide_of_another_encoder_class_count_or_normalisation_is_refused(settings, write_dit, encoder):
    guided = replace(settings, guidance="autoguidance", guidance_scale=1.5)
    refusals = [
        (
            write_dit(encoder=replace(encoder, weights_digest="another")),
            IdentityMismatchError,
            "another encoder",
        ),
        (write_dit(num_classes=5), UsageError, "has 5 and the model 3"),
        (write_dit(variance=0.25), IdentityMismatchError, "statistics in .* differ"),
    ]
    for guide, kind, reason in refusals:
        with pytest.raises(kind, match=reason):
            generate(replace(guided, guide=guide))


def test_networks_in_each_others_place_are_refused(settings, dit, decoder):
    with pytest.raises(UsageError, match="is a decoder's"):
        generate(replace(settings, snapshot=decoder))
    with pytest.raises(UsageError, match="is a dit's"):
        generate(replace(settings, decoder=dit))


def test_classifier_free_guidance_needs_a_null_label(settings, write_dit):
    with pytest.raises(UsageError, match="has no null label"):
        generate(replace(settings, snapshot=write_dit(null_label=False), guidance="cfg", guidance_scale=2.0))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"guidance": "autoguidance", "guidance_scale": 1.5}, "give --guide SNAPSHOT"),
        ({"guidance": "cfg"}, "needs its weight"),
        ({"guidance_scale": 2.0}, "needs a guidance"),
        ({"guide": SCRIPT}, "is for --guidance autoguidance"),
        ({"guide": Path("x")}, "found none at x"),
        ({"reference": Path("x")}, "found nothing at x"),
        ({"protocol": "imagenet256-unguided"}, "found none in data/; fetch it from https"),
        ({"guidance": "cfg", "guidance_scale": 0.5}, "at least 1"),
    ],
)
def test_choices_that_do_not_fit_together_are_refused(settings, changes, reason):
    with pytest.raises(UsageError, match=reason):
        generate(replace(settings, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_samples": 0},
        {"points": 1},
        {"batch_size": 0},
        {"guidance_interval": (0.5, 0.2)},
        {"grid_rows": 0},
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_loaded(settings, changes):
    with pytest.raises(UsageError):
        replace(settings, **changes)


def test_help_answers_without_torch():
    program = (
        "import sys\n"
        "from eval.generation import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'timm', 'zarr', 'pydantic'} & set(sys.modules), 'heavy'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--guidance-scale" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing.safetensors", "--decoder", "b"], 2, "error: a snapshot is a file"),
        (["a", "--decoder", "b", "--num", "0"], 2, "error: --num-samples must be at least 1, got 0"),
    ],
)
def test_the_command_answers_mistakes_with_one_line_and_a_code(tmp_path, arguments, code, message):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == code
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def pictures(tmp_path):
    """A folder of twelve real-looking images to compare with."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        image = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        image.resize((24, 20), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def test_metrics_are_computed_against_a_reference_and_warned_about(settings, pictures, capsys):
    results = generate(
        replace(
            settings,
            reference=pictures,
            metrics=("is", "precision_recall"),
            feature_weights="random:0",
            num_samples=6,
        )
    )
    assert set(results["metrics"]) == {"is", "precision", "recall"}
    assert results["metrics"]["is"] >= 1
    assert results["reference"] == {"name": "pictures", "kind": "folder", "count": 8}
    assert set(results["feature_networks"]) == {"inception-v3-compat"}
    assert len(results["warnings"]) == 2
    assert "warning: gFID of 6 images" in capsys.readouterr().err


@pytest.mark.slow
def test_a_protocol_writes_our_row_below_the_published_ones(settings, write_decoder, pictures):
    results = generate(
        replace(
            settings,
            decoder=write_decoder(patch_size=128),
            protocol="imagenet256-unguided",
            reference=pictures,
            feature_weights="random:0",
            num_samples=6,
        )
    )
    assert set(results["metrics"]) == {"fid", "sfid", "is", "precision", "recall"}
    assert all(np.isfinite(value) for value in results["metrics"].values())
    last = (settings.out / "table.md").read_text().splitlines()[-1]
    assert f"| {results['metrics']['fid']:.2f} |" in last
    assert "num samples 6 instead of 50000" in last


def test_a_protocol_for_another_size_is_refused(settings, pictures):
    with pytest.raises(UsageError, match="is for 256×256 images, the decoder makes 16×16"):
        generate(replace(settings, protocol="imagenet256-unguided", reference=pictures))
