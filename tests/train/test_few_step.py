"""Students of a teacher: what each stage starts from, learns and refuses, and that it resumes like any other run."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.errors import IdentityMismatchError, UsageError, UserError
from train import dit
from train.engine.feed import MicroBatch
from train.flow.mean_flow import adaptive_loss, average_velocity_target, difference_quotient
from train.flow.path import interpolate
from train.models import dit_dh
from train.models.build import build_model
from train.models.compilation import compile_blocks
from train.models.dequantize import Dequantizer
from train.models.embeddings import initialise_as_published
from train.randomness import normal
from train.report.metrics_file import read_metrics
from train.settings.few_step import MeanFlowSettings, MidTrainingSettings, TeacherGuidance, forward_passes
from train.settings.presets import DIT_PRESETS, STAGES, dit_settings
from train.tasks.mean_flow import ERROR_BY_GAP, ERROR_BY_TIME, MeanFlowTask
from train.tasks.mid_training import MidTrainingTask
from train.tasks.parts import DiTParts
from train.tasks.teacher import load_teacher
from train.weights.published import save_state_dict, save_statistics
from train.weights.snapshot import load_snapshot
from train.weights.tensor_files import file_digest

ROOT = Path(__file__).parents[2]
TORCHRUN = str(Path(sys.executable).parent / "torchrun")
EXACT = "--checkpoint-every 100 --snapshot-every 100"
STAGE = {
    "mid-training": "--objective mid-training --mid-training.points 5 --mid-training.pairs 3",
    "mean-flow": "--objective mean-flow --flow.time-distribution uniform",
    "fine-tuning": "--objective mean-flow --flow.time-distribution uniform",
}


def start_of(stage, teacher):
    """Arguments that give a stage what it starts from; fine-tuning has no teacher."""
    return f"--{'init-from' if stage == 'fine-tuning' else 'teacher'} {teacher}"


LATEST = "snapshots/latest.safetensors"
END_TIME = "r_embedder."


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, store_path):
    """Snapshot of a network that has learnt for a few steps, so that nothing of it is zero."""
    out = tmp_path_factory.mktemp("teacher")
    # The network of the fixture `arguments`.
    network = (
        "dit-dh-tiny --model.width 16 --model.depth 1 --model.num-heads 2 --model.head-width 16"
        " --model.head-depth 1 --model.head-num-heads 2"
    )
    common = f"--store {store_path} --out {out} --global-batch-size 8 --seed 3 --tracker none --ema-rates 0.9"
    assert dit.main(f"{network} {common} --max-steps 4 --optimizer.lr 0.02".split()) == 0
    return out / LATEST


@pytest.fixture
def train_stage(train_here, teacher):
    """Train a stage: `train_stage("mean-flow", out, "--max-steps 2")`."""

    def run(stage, out, more="", *, teacher=teacher, **kwargs):
        given = "" if teacher is None else start_of(stage, teacher)
        return train_here("dit", out, f"{STAGE[stage]} {given} {EXACT} {more}", **kwargs)

    return run


def weights_of(out):
    return load_snapshot(out / LATEST).model.state_dict()


@pytest.mark.parametrize("stage", STAGE)
def test_n_and_n_steps_of_a_stage_equal_2n_bit_for_bit(
    stage, tmp_path, train_stage, checkpoint_tensors, losses
):
    train_stage(stage, tmp_path / "whole", "--max-steps 4")
    train_stage(stage, tmp_path / "halves", "--max-steps 2")
    train_stage(stage, tmp_path / "halves", "--max-steps 4")
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")
    whole, halves = (checkpoint_tensors(tmp_path / run) for run in ("whole", "halves"))
    assert whole.keys() == halves.keys()
    assert {name.split("/")[0] for name in whole} == {"model", "optimizer", "ema-0.9", "ema-0.5"}
    assert all(torch.equal(tensor, halves[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("stage", STAGE)
def test_micro_batches_of_a_stage_learn_what_the_whole_batch_does(
    stage, tmp_path, train_stage, checkpoint_tensors, losses
):
    train_stage(stage, tmp_path / "whole", "--max-steps 3")
    train_stage(stage, tmp_path / "parts", "--max-steps 3 --micro-batch-size 3")
    one, other = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert all(other[step] == pytest.approx(loss, rel=1e-4) for step, loss in one.items())
    found = checkpoint_tensors(tmp_path / "parts")
    for name, tensor in checkpoint_tensors(tmp_path / "whole").items():
        if name.startswith("ema-0.9"):
            assert (tensor - found[name]).abs().max() <= 1e-3 * max(1.0, tensor.abs().max()), name


@pytest.mark.slow  # starts two processes
@pytest.mark.parametrize("stage", STAGE)
def test_two_processes_train_a_stage_as_one_does(
    stage, tmp_path, arguments, train_stage, teacher, checkpoint_tensors, losses
):
    train_stage(stage, tmp_path / "one", "--max-steps 3")
    more = f"{STAGE[stage]} {start_of(stage, teacher)} {EXACT} --max-steps 3"
    command = [TORCHRUN, "--standalone", "--nproc_per_node", "2", "train/dit.py"]
    done = subprocess.run(
        [*command, *arguments("dit", tmp_path / "two", more)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(two[step] == pytest.approx(loss, rel=1e-4) for step, loss in one.items())
    found = checkpoint_tensors(tmp_path / "two")
    for name, tensor in checkpoint_tensors(tmp_path / "one").items():
        if name.startswith("ema-0.9"):
            assert (tensor - found[name]).abs().max() <= 1e-3 * max(1.0, tensor.abs().max()), name


@pytest.mark.slow  # starts a process for each kill
@pytest.mark.parametrize("stage", STAGE)
def test_a_stage_killed_at_any_moment_ends_as_one_that_was_not(
    stage, tmp_path, arguments, train_stage, teacher, checkpoint_tensors
):
    frequent = "--checkpoint-every 2 --max-steps 12"
    train_stage(stage, tmp_path / "whole", frequent.replace("2 ", "100 ", 1))
    more = f"{STAGE[stage]} {start_of(stage, teacher)} {frequent}"
    command = [sys.executable, "train/dit.py", *arguments("dit", tmp_path / "killed", more)]
    for seen in (1, 3, 5):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "killed").glob("checkpoints/step-*"))) < min(seen, 2):
            assert time.monotonic() < deadline
            assert process.poll() is None or process.returncode == 0
            time.sleep(0.02)
        process.kill()
        process.wait()
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=240).returncode == 0
    whole, killed = (checkpoint_tensors(tmp_path / run) for run in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(tensor, killed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("stage", STAGE)
def test_a_student_starts_as_its_teacher(stage, tmp_path, train_stage, teacher):
    train_stage(stage, tmp_path, "--max-steps 1 --optimizer.lr 1e-12")
    started, taught = weights_of(tmp_path), load_snapshot(teacher).model.state_dict()
    assert {name for name in started if name not in taught} == {
        f"{END_TIME}{name}" for name in ("W", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias")
    }
    for name, value in taught.items():
        assert torch.allclose(started[name], value, atol=1e-9), name
    assert all(started[f"{END_TIME}mlp.2.{kind}"].abs().max() < 1e-9 for kind in ("weight", "bias"))
    train_stage(stage, tmp_path / "published", "--max-steps 1 --optimizer.lr 1e-12 --end-time-init published")
    assert weights_of(tmp_path / "published")[f"{END_TIME}mlp.2.weight"].abs().max() > 0.1


def test_stages_follow_each_other_and_fine_tuning_needs_no_teacher(tmp_path, train_stage, teacher):
    train_stage("mid-training", tmp_path / "cmt", "--max-steps 2")
    train_stage("mean-flow", tmp_path / "mfd", f"--max-steps 2 --init-from {tmp_path / 'cmt' / LATEST}")
    train_stage(
        "mean-flow",
        tmp_path / "mft",
        f"--max-steps 1 --optimizer.lr 1e-12 --init-from {tmp_path / 'mfd' / LATEST}",
        teacher=None,
    )
    before, after = weights_of(tmp_path / "mfd"), weights_of(tmp_path / "mft")
    assert all(torch.allclose(after[name], value, atol=1e-9) for name, value in before.items())
    assert not torch.equal(
        weights_of(tmp_path / "cmt")["x_embedder.proj.weight"], before["x_embedder.proj.weight"]
    )


def test_mid_training_reads_no_tokens_of_a_store_or_of_several(tmp_path, store_path, make_store, train_stage):
    stores = tmp_path / "one", make_store(tmp_path / "other", num_images=10)
    shutil.copytree(store_path, stores[0])
    for store in stores:
        for shard in (store / "center/tokens").rglob("c/*"):
            if shard.is_file():
                shard.unlink()
    assert train_stage("mid-training", tmp_path / "run", "--max-steps 2", store=stores[0]) == 0
    mixed = f"{stores[0]} {stores[1]} --max-steps 2 --store-weights 2 1"
    assert train_stage("mid-training", tmp_path / "mixed", store=mixed) == 0


@pytest.mark.parametrize("stage", STAGE)
def test_what_is_logged_tells_how_well_the_student_does(stage, tmp_path, train_stage):
    train_stage(stage, tmp_path, "--max-steps 4 --optimizer.lr 0.01 --log-every 4")
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    by_gap = {name: value for name, value in line.items() if name.startswith("error_gap")}
    by_time = {name: value for name, value in line.items() if name.startswith("error_t")}
    assert by_gap
    assert by_time
    # Not the weighted loss, which is 1 whatever the student does.
    assert (
        min(*by_gap.values(), *by_time.values()) <= line["loss"] <= max(*by_gap.values(), *by_time.values())
    )
    assert abs(line["loss"] - 1) > 1e-3
    assert ("derivative_rms" in line) == (stage != "mid-training")
    page = (tmp_path / "index.html").read_text()
    assert "squared error by length of the jump" in page


def test_a_continued_run_keeps_its_teacher(tmp_path, train_stage, teacher):
    moved = tmp_path / "moved.safetensors"
    shutil.copy(teacher, moved)
    train_stage("mean-flow", tmp_path / "run", "--max-steps 1")
    train_stage("mean-flow", tmp_path / "run", "--max-steps 2", teacher=moved)
    train_stage("mean-flow", tmp_path / "other", "--max-steps 1", teacher=moved)
    with pytest.raises(UserError, match="another teacher"):
        train_stage("mean-flow", tmp_path / "run", "--max-steps 3", teacher=tmp_path / "other" / LATEST)
    insists = f"--max-steps 3 --init-from {moved} --allow-change init_from"
    with pytest.raises(UserError, match="another teacher"):
        train_stage("mean-flow", tmp_path / "run", insists, teacher=None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--objective mid-training", "give --teacher SNAPSHOT"),
        ("--objective mean-flow", "give --init-from SNAPSHOT"),
        ("--teacher-guidance.kind cfg --teacher-guidance.scale 2", "needs a teacher"),
        ("--teacher {teacher}", "--teacher is for"),
        ("--objective mean-flow --teacher {teacher} --mean-flow.derivative bf16", "fp32 or tf32"),
        ("--objective mean-flow --teacher {teacher} --teacher-guidance.scale 2", "need a guidance"),
        ("--objective mean-flow --teacher {teacher} --teacher-guidance.kind cfg", "above 1"),
        (
            "--objective mean-flow --teacher {teacher} --teacher-guidance.kind autoguidance "
            "--teacher-guidance.scale 2",
            "need each other",
        ),
        ("--objective mean-flow --teacher {teacher} --mean-flow.share 0", "share"),
        ("--objective mean-flow --teacher nothing.pt", "no file nothing.pt"),
        (
            "--objective mean-flow --teacher {teacher} --flow.shift-base 64",
            "shift-base 512 and this run has 64",
        ),
        ("--objective mean-flow --teacher {teacher} --model.width 32", "another network"),
        (
            "--objective mean-flow --init-from {teacher} --model.depth 2",
            r"missing: blocks\.2\.adaLN_modulation\.1\.bias, .*blocks\.2\.attn\.proj\.bias",
        ),
        ("--objective mean-flow --init-from {folder}", "give RUN/snapshots/latest.safetensors"),
        (
            "--objective mean-flow --init-from {teacher} --flow.prediction x --flow.time-floor 0.05",
            "give --flow.prediction velocity",
        ),
        (
            "--objective mean-flow --teacher {teacher} --repa.field other",
            "does not align a network that learns jumps",
        ),
    ],
)
def test_a_stage_without_what_it_needs_is_refused(more, message, tmp_path, train_here, teacher):
    with pytest.raises(UserError, match=message):
        train_here("dit", tmp_path, more.format(teacher=teacher, folder=teacher.parent) + " --max-steps 1")


def test_a_teacher_of_other_latents_or_classes_is_refused(tmp_path, make_store, train_stage, teacher):
    # The teacher gives statistics to a run that starts from it, so begin with others.
    other = make_store(tmp_path / "other", num_images=12, class_names=("ant", "bee", "cow"))
    with pytest.raises(IdentityMismatchError, match="other classes"):
        train_stage("mean-flow", tmp_path / "classes", "--max-steps 1", store=other)
    more = make_store(tmp_path / "more", num_images=12, class_names=("ant", "bee", "cat", "dog"))
    with pytest.raises(IdentityMismatchError, match="num_classes 3 and this run 4"):
        train_stage("mean-flow", tmp_path / "more-classes", "--max-steps 1", store=more)
    wide = make_store(tmp_path / "wide", num_images=12, width=12)
    with pytest.raises(UserError, match="another network"):
        train_stage("mean-flow", tmp_path / "width", "--max-steps 1", store=wide)
    snapshot = load_snapshot(teacher)
    snapshot.normalizer.variance.mul_(2)
    save_statistics(snapshot.normalizer, tmp_path / "stat.pt")
    with pytest.raises(IdentityMismatchError, match="normalised as the run's"):
        train_stage(
            "mean-flow", tmp_path / "statistics", f"--max-steps 1 --statistics {tmp_path / 'stat.pt'}"
        )


def test_a_published_teacher_needs_its_statistics(tmp_path, train_here, train_stage, losses):
    # The head has a width of its own, or no file tells which blocks are the head's.
    wide = "--model.head-width 24"
    train_here("dit", tmp_path / "teacher", f"--max-steps 2 --optimizer.lr 0.02 {wide}")
    snapshot = load_snapshot(tmp_path / "teacher" / LATEST)
    save_state_dict(snapshot.model, tmp_path / "stage2_model.pt")
    save_statistics(snapshot.normalizer, tmp_path / "stat.pt")
    published = {"teacher": tmp_path / "stage2_model.pt"}
    with pytest.raises(UsageError, match="give --statistics"):
        train_stage("mean-flow", tmp_path / "refused", f"--max-steps 1 {wide}", **published)
    given = f"--max-steps 2 {wide} --statistics {tmp_path / 'stat.pt'}"
    train_stage("mean-flow", tmp_path / "run", given, **published)
    train_stage(
        "mean-flow", tmp_path / "ours", f"--max-steps 2 {wide}", teacher=tmp_path / "teacher" / LATEST
    )
    assert losses(tmp_path / "run") == losses(tmp_path / "ours")


def parts_of(teacher, **changes):
    """A student of the teacher that has learnt something of its own."""
    snapshot = load_snapshot(teacher)
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(snapshot.config, end_time=True))
    model.load_state_dict(snapshot.model.state_dict(), strict=False)
    initialise_as_published(model.r_embedder)
    return DiTParts(
        settings=dataclasses.replace(
            dit_settings("dit-dh-tiny-mfd"), **{"teacher": teacher, "compile": False, **changes}
        ),
        model=model,
        normalizer=snapshot.normalizer,
        dequantizer=Dequantizer(None),
        snapshot_meta=lambda step, rate: None,
    )


def micro_batch(first, size=11):
    """Consecutive samples of the stream, with tokens for the teacher's network."""
    return MicroBatch(
        step=0,
        rows=np.arange(size),
        positions=torch.arange(first, first + size),
        labels=torch.arange(size) % 3,
        fields={"tokens": torch.randn(size, 16, 8)},
        last_of_step=True,
    )


@pytest.mark.parametrize("jumps", ["spread", "random"])
def test_losses_are_those_of_the_identity_computed_for_every_row(jumps, teacher):
    task = MeanFlowTask(parts_of(teacher, mean_flow=MeanFlowSettings(share=0.3, jumps=jumps)))
    batch = micro_batch(50)
    t, r = task.spans(batch.positions)
    assert 0 < (r < t).sum() < 11
    data, y = task.normalizer.to_latents(batch.fields["tokens"]), task.labels(batch)
    x_t = interpolate(data, normal(0, "noise", batch.positions, tuple(data.shape[1:])), t)
    velocity = load_snapshot(teacher).model(x_t, t, y).detach()
    derivative = difference_quotient(task.model, x_t, t, r, velocity, (y, y), 5e-3).detach()
    target = average_velocity_target(velocity, t, r, derivative)
    expected, error = adaptive_loss(task.model(x_t, t, y, r), target)
    found = task.losses(task.model, batch)
    assert torch.allclose(found.per_sample, expected)
    assert torch.allclose(found.logged, error / data[0].numel(), rtol=1e-4)
    sums = torch.stack([found.metrics[name] for name in (*ERROR_BY_TIME, *ERROR_BY_GAP)]).sum(0)
    assert torch.allclose(sums, torch.tensor([found.logged.sum(), 11.0]))
    found.per_sample.sum().backward()
    assert not task.model.r_embedder.W.requires_grad


@pytest.mark.slow  # the compiler traces each call
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("objective", [MeanFlowTask, MidTrainingTask])
def test_a_compiled_stage_is_compiled_once_for_all_steps(objective, teacher, monkeypatch):
    # The compiler in front of the blocks is the real one; what it would make of them is not looked at.
    monkeypatch.setattr(dit_dh, "compile_blocks", functools.partial(compile_blocks, backend="eager"))
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters["stats"]
    task = objective(parts_of(teacher, compile=True, mid_training=MidTrainingSettings(points=4, pairs=3)))
    task.model.compile()

    def step(first):
        with torch.autocast("cpu", torch.bfloat16):
            loss = task.losses(task.model, micro_batch(first)).per_sample.mean()
        loss.backward()
        return counters["unique_graphs"]

    compiled = step(0)
    assert compiled > 0
    # Half of them are jumps: five or six of a micro-batch of 11.
    assert [step(first) for first in (11, 22, 33, 44)] == [compiled] * 4


def test_a_guided_teacher_is_another_field(teacher):
    x, t, y = torch.randn(3, 8, 4, 4), torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0, 1, 2])
    plain = load_teacher(parts_of(teacher)).field(y)(x, t)
    none = load_teacher(parts_of(teacher)).field(torch.full_like(y, 3))(x, t)
    guidance = TeacherGuidance(kind="cfg", scale=2.0, interval=(0.1, 0.6))
    guided = load_teacher(parts_of(teacher, teacher_guidance=guidance)).field(y)(x, t)
    assert torch.allclose(guided[:2], (2 * plain - none)[:2], atol=1e-5)
    assert torch.allclose(guided[2], plain[2], atol=1e-6)
    assert not torch.allclose(guided, plain)
    by_itself = TeacherGuidance(kind="autoguidance", scale=1.5, guide=teacher)
    loaded = load_teacher(parts_of(teacher, teacher_guidance=by_itself))
    assert torch.allclose(loaded.field(y)(x, t), plain, atol=1e-6)
    assert loaded.facts.keys() == {"teacher", "teacher_guidance.guide"}


def test_a_teacher_in_bfloat16_is_nearly_the_same_field(teacher):
    x, t, y = torch.randn(3, 8, 4, 4), torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0, 1, 2])
    whole, half = (
        load_teacher(parts_of(teacher, teacher_dtype=dtype)).field(y)(x, t)
        for dtype in ("float32", "bfloat16")
    )
    assert half.dtype == torch.float32
    assert 0 < (half - whole).norm() / whole.norm() < 0.03


def test_the_rule_of_presets_changes_the_stage_and_nothing_else():
    for name in DIT_PRESETS:
        base = dit_settings(name)
        for stage, row in STAGES.items():
            settings = dit_settings(f"{name}-{stage}")
            assert settings.objective == row.objective
            assert settings.model == base.model
            assert settings.flow.shift_base == base.flow.shift_base
            assert settings.flow.time_distribution == "uniform"
            # What is not tiny learns as published, whatever its grid.
            assert (settings.optimizer.lr == 1e-4) == (settings.mean_flow == MeanFlowSettings())
            assert (settings.optimizer.lr == 1e-4) == ("tiny" not in name)
    assert dit_settings("dit-dh-xl-256-cmt").mid_training.pairs == 64
    assert dit_settings("dit-dh-xl-512-cmt").mid_training.pairs == 8
    assert dit_settings("dit-dh-xl-256-mfd").ema_rates == (0.9999,)
    assert dit_settings("dit-dh-xl-512-mfd").global_batch_size == 128
    with pytest.raises(UsageError, match=r"and each of them with -cmt, -mfd, -mft"):
        dit_settings("dit-dh-xl-256-mfx")


def test_what_a_step_costs_is_counted_in_forward_passes():
    base = dit_settings("dit-dh-xl-256")
    assert forward_passes(base) == 3
    taught = {"teacher": Path("teacher.safetensors")}
    distilled = dataclasses.replace(dit_settings("dit-dh-xl-256-mfd"), **taught)
    assert forward_passes(distilled) == 4.5
    assert forward_passes(dataclasses.replace(distilled, activation_checkpointing=True)) == 5.5
    guided = dataclasses.replace(distilled, teacher_guidance=TeacherGuidance(kind="cfg", scale=2.0))
    assert forward_passes(guided) == 5.5
    assert forward_passes(dit_settings("dit-dh-xl-256-mft")) == 3.5
    assert forward_passes(dataclasses.replace(dit_settings("dit-dh-xl-256-cmt"), **taught)) == 207
    assert forward_passes(dataclasses.replace(dit_settings("dit-dh-xl-512-cmt"), **taught)) == 39


def test_raev2s_network_is_distilled_with_its_own_guidance(tmp_path, store_path):
    tiny = (
        "--model.width 16 --model.depth 2 --model.num-heads 2 --model.head-width 16 --model.head-num-heads 2"
    )
    common = (
        f"{tiny} --store {store_path} --global-batch-size 8 --tracker none --max-steps 2 --optimizer.lr 0.01"
    )
    teacher = tmp_path / "teacher" / LATEST
    assert dit.main(f"raev2-tiny {common} --out {tmp_path / 'teacher'} --model.base-depth 1".split()) == 0
    guided = "--teacher-guidance.kind internal --teacher-guidance.scale 1.5 --model.base-depth 1"
    start = ""
    for stage in ("cmt", "mfd"):
        out = tmp_path / stage
        given = f"{common} --out {out} --teacher {teacher} {guided} {start} --mid-training.pairs 2"
        assert dit.main(f"raev2-tiny-{stage} {given}".split()) == 0
        start = f"--init-from {out / LATEST}"
    snapshot = load_snapshot(tmp_path / "mfd" / LATEST)
    assert snapshot.config.end_time
    assert snapshot.meta.prediction == "x"
    assert snapshot.meta.teacher == file_digest(teacher)
    before, after = load_snapshot(teacher).model.state_dict(), snapshot.model.state_dict()
    assert not torch.equal(before["base_final_layer.linear.weight"], after["base_final_layer.linear.weight"])
    wrong = f"{common} --out {tmp_path / 'wrong'} --teacher {teacher} --flow.prediction velocity"
    with pytest.raises(UserError, match="puts out what its teacher does"):
        dit.main(f"raev2-tiny-mfd {wrong} --model.base-depth 1".split())
