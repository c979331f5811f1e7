"""What a run says of itself: its peak memory, how long it takes, a schedule that cannot do, a poor end."""

import gc
import re
import shlex

import psutil
import pytest
import torch

from mae_core.flops import step_flops
from mae_core.optim import lr_at
from pipelines.config import Config, total_steps, warmup_note, warmup_steps
from pipelines.data.feed import Feed, join_crew
from pipelines.data.next_step import next_step
from pipelines.data.plan import Cut, Plan
from pipelines.data.readers import Stream, View
from pipelines.data.shards import load_manifest
from pipelines.estimate import main as estimate
from pipelines.estimation import plan_work
from pipelines.pretrain import check, read_config
from pipelines.spool import Spool
from pipelines.training import progress
from pipelines.training.build import build_model
from pipelines.training.duration import Duration
from pipelines.training.outcome import notes, read_record
from pipelines.training.progress import PeakMemory, Progress, _resident_mib
from pipelines.training.unreadable import Unreadable

CPU = torch.device("cpu")


def test_peak_memory_does_not_rise_with_the_batches(ray_local, shards):
    """Pages of the object store that a worker has looked at stay resident in it, and are not its own."""
    manifest, steps, rows = load_manifest(shards["train"]), 200, 64
    stream = Stream(manifest, Plan(manifest.num_samples, 0), Cut(rows, rows, 1), View((64, 64), 3, 0))
    crew, peak = join_crew(0, 1, num_cpus=0.5), PeakMemory(CPU)
    before = shared_before = batch_mib = 0.0
    for step, batch in enumerate(Feed(stream, (0, steps), crew=crew, num_tasks=40)):
        torch.from_numpy(batch.images_BHWC.copy()).float()
        batch_mib = batch.images_BHWC.nbytes / 2**20
        if step == 50:
            gc.collect()
            before, (_, shared_before) = peak.mib(), _resident_mib()
    batches_mib = (steps - 51) * batch_mib
    _, shared = _resident_mib()
    assert shared - shared_before > 0.3 * batches_mib, "the store's pages are looked at, or this shows nothing"
    assert peak.mib() - before < 0.1 * batches_mib
    assert peak.mib() >= psutil.Process().memory_info().rss / 2**20 - shared - 10


# ---- how long it takes


def configuration(**sections) -> Config:
    values = {"data": {"image_size": (64, 64)}, "batch": {"global_size": 64}, "train": {"steps": 1000},
              "optim": {"warmup_epochs": 0.5}, "model": SMALL}  # fmt: skip
    return Config.model_validate({name: values.get(name, {}) | sections.get(name, {}) for name in {*values, *sections}})


SMALL = {"arch": "vit_tiny_patch16_224", "patch_size": 8, "depth": 2, "decoder_width": 32, "decoder_depth": 1,
         "decoder_heads": 1}  # fmt: skip


def told_of(config: Config, seconds: list[float], *, rate: float, on_cpus: bool = True, start: int = 0) -> list[str]:
    """What is said of the time at the start, and as steps end at these seconds."""
    with torch.device("meta"):
        model = build_model(config)
    duration = Duration(config, model, config.train.steps, 4000, rate, on_cpus)
    lines = list(duration.begin(start, 0.0))
    for done, now in enumerate(seconds, start=start + 1):
        lines += duration.step(done, now)
    return lines


def test_a_run_says_how_long_it_takes_by_arithmetic_and_then_by_its_first_steps():
    config = configuration()
    with torch.device("meta"):
        flops = step_flops(build_model(config)).training
    # The first step waits for its data and counts for nothing; ten more of half a second each: 989 are left.
    seconds = [30 + step / 2 for step in range(30)]
    first, second = told_of(config, seconds, rate=1000 * 64 * flops / 120)
    assert first.startswith("this will take 2.0 min at least: ")
    assert second == "about 8.2 min left, by the first steps: 128 images/s, without probes and checkpoints"
    # Gone on with, it is the rest.
    first, second = told_of(config, seconds, rate=1000 * 64 * flops / 120, start=500)
    assert first.startswith("this will take 1.0 min at least")
    assert second.startswith("about 4.1 min left")
    # A step of minutes tells enough by itself.
    _, second = told_of(config, [400.0], rate=1000 * 64 * flops / 120)[:2]
    assert second.startswith("about 111 h (4.6 days) left, by the first steps: 0.16 images/s")


def test_what_takes_days_on_cpus_comes_with_flags_that_do_not():
    config = Config.model_validate({"train": {"steps": 5000}})
    rate = 1e11
    lines = told_of(config, [], rate=rate)
    assert "days) at least" in lines[0]
    (proposed,) = lines[1:]
    flags = re.search(r"that is days on CPUs: about ([\d.]+) h with (--.*)$", proposed)
    assert flags
    smaller = read_config(["--train.steps", "5000", *flags[2].split()])
    assert smaller.model.arch == "vit_tiny_patch16_224"
    with torch.device("meta"):
        flops = step_flops(build_model(smaller)).training
    hours = smaller.train.steps * smaller.batch.global_size * flops / rate / 3600
    assert hours == pytest.approx(float(flags[1]), rel=0.01)
    assert hours < 24
    assert len(told_of(config, [], rate=rate, on_cpus=False)) == 1
    # Said by the first steps, where arithmetic alone hoped for less; and once.
    lines = told_of(config, [300.0 * step for step in range(1, 5)], rate=1e15)
    assert [("days on CPUs" in line) for line in lines] == [False, False, True]
    again = told_of(config, [300.0 * step for step in range(1, 5)], rate=rate)
    assert [("days on CPUs" in line) for line in again] == [False, True, False]
    # A model that is small already takes fewer steps alone.
    small = configuration(train={"steps": 10**7})
    assert re.search(r"about 8\.0 h with --train\.steps \d+$", told_of(small, [], rate=1e10)[1])


@pytest.mark.parametrize(("gain", "precision", "said"), [
    (3.4, "float32", True), (3.4, "auto", True), (2.9, "auto", False), (0.0, "auto", False), (9.0, "bfloat16", False),
])  # fmt: skip
def test_a_run_says_at_its_start_where_bfloat16_is_worth_it(gain, precision, said, monkeypatch, tmp_path):
    monkeypatch.setattr(progress, "bfloat16_gain", lambda _: gain)
    config, lines = configuration(train={"steps": 10, "precision": precision}), []
    model = build_model(config)
    for spool in (Spool(tmp_path), None):  # rank 0 and another
        Progress(config, model, 10, 100, Unreadable(None, CPU), CPU, spool, lines.append).begin(0)
    hint = f"bfloat16 matrices are multiplied {gain} times as fast as float32 ones on this processor"
    assert [hint in line for line in lines].count(True) == said


# ---- the command that comes after packing


@pytest.mark.parametrize(("gpu", "most"), [(False, 100e12), (True, 1e20)])
def test_what_comes_after_packing_is_a_run_that_this_machine_ends(shards, gpu, most, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere")  # whose GPUs nobody counts here
    manifest = load_manifest(shards["train"])
    command = shlex.split(next_step(manifest, shards["test"], gpu=gpu))
    assert command[1:3] == ["-m", "pipelines.pretrain"]
    config = read_config(command[3:])
    train, labelled, test = check(config)
    assert labelled is not None
    assert test is not None
    assert (train.num_samples, labelled.num_samples, test.num_samples) == (300, 300, 60)
    assert config.run.name != "mae"
    assert config.data.image_size[0] in (14, 24), "as large as the images are"
    # Some minutes at the 0.2 TFLOP/s of a few cores.
    work = plan_work(config, manifest.num_samples)
    assert work.flops.training * work.images <= most
    assert not warmup_note(config, manifest.num_samples)
    assert config.scale.gpu == gpu
    assert config.model.arch == ("vit_base_patch16_224" if gpu else "vit_tiny_patch16_224")
    assert plan_work(config, 10**6).steps <= 1000 or gpu, "however many images there are"


@pytest.mark.parametrize(
    ("side", "gpu", "flags"),
    [
        (500, False, []),
        (500, True, []),
        (64, False, []),
        (32, False, ["--data.image-size 32", "--model.patch-size 4"]),
        (28, True, ["--data.image-size 28", "--model.patch-size 2"]),
        (128, True, ["--data.image-size 126", "--model.patch-size 9"]),
    ],
)
def test_the_images_decide_the_size(shards, monkeypatch, side, gpu, flags):
    monkeypatch.setattr("pipelines.data.next_step._side", lambda _: side)
    command = next_step(load_manifest(shards["train"]), gpu=gpu)
    assert [flag for flag in flags if flag in command] == flags
    assert ("--data.image-size" in command) == bool(flags)


# ---- a schedule that cannot do what it says


def test_a_warm_up_that_is_longer_than_the_run_is_said_with_the_flag(shards, capsys):
    config = configuration(train={"steps": 0, "epochs": 11.0}, optim={"warmup_epochs": 40.0})
    note = warmup_note(config, 4000)
    assert note == (
        "optim.warmup_epochs 40 is no shorter than the run, of 11 epochs: its learning rate rises to the end and "
        "never falls; set --optim.warmup-epochs 0.55"
    )
    steps = total_steps(config, 4000)
    assert warmup_steps(config, 4000) == steps
    rates = [lr_at(step, peak=1.0, warmup_steps=steps, total_steps=steps) for step in range(steps)]
    assert rates == sorted(rates)
    mended = configuration(train={"steps": 0, "epochs": 11.0}, optim={"warmup_epochs": 0.55})
    assert not warmup_note(mended, 4000)
    assert not warmup_note(configuration(optim={"warmup_epochs": 0.0}, train={"steps": 1}), 4000)
    flags = [part for key, value in SMALL.items() for part in (f"--model.{key.replace('_', '-')}", str(value))]
    flags += ["--data.train", shards["train"], "--data.image-size", "16", "16", "--batch.global-size", "20"]
    assert estimate(["--seconds", "0.01", "--train.steps", "3", *flags]) == 0
    assert "warm-up        optim.warmup_epochs 40 is no shorter than the run, of 0.2 epochs" in capsys.readouterr().out


# ---- what a finished run says of itself


def test_a_run_whose_probes_do_not_beat_a_random_encoder_says_so():
    scores = {"test/knn_top1": 54.3, "test/random_knn_top1": 57.5, "test/linear_top1": 61.0,
              "test/random_linear_top1": 60.0, "probe/linear_top1": 50.0}  # fmt: skip
    (note,) = notes(configuration(train={"steps": 300}), 3476, scores, [1.0, 0.5], {})
    assert note.startswith(
        "the probes do not beat the random encoder (kNN 54.3 % against 57.5 %). What usually helps: "
    )
    assert "more steps (these were 300, 5.52 epochs; the paper has 800)" in note
    assert "--model.patch-size 4" in note
    assert notes(configuration(), 3476, {**scores, "test/knn_top1": 57.6}, [1.0, 0.5], {}) == []
    # Without test images the encoder before its first step stands in.
    found = {"probe/knn_top1": 40.0, "probe/linear_top1": 50.0, "probe/effective_rank": 3.0}
    before = {"probe/knn_top1": 39.0, "probe/linear_top1": 50.0, "probe/effective_rank": 9.0}
    (note,) = notes(configuration(), 3476, found, [1.0, 0.5], before)
    assert "(linear probe 50.0 % against 50.0 %)" in note
    assert notes(configuration(probe={"early_share": 0.5}), 3476, found, [1.0, 0.5], before) == []
    assert notes(configuration(run={"init_from": "x"}), 3476, scores, [1.0, 0.5], {}) == []


def test_a_run_whose_loss_has_hardly_moved_says_so():
    def said(losses, **model):
        return notes(configuration(model=model), 4000, {}, losses, {})

    (note,) = said([1.02, 0.99, *[0.97] * 20])
    assert note.startswith("the loss has hardly moved (from 1.020 to 0.970; predicting the mean of each patch would ")
    assert said([1.3, *[0.96] * 20]), "the mean of each patch is all that it has learned"
    assert said([0.95, 0.8, *[0.5] * 20]) == []
    assert said([0.3, *[0.29] * 20], target="raw")
    assert said([0.3, *[0.25] * 20], target="raw") == []
    assert said([0.3]) == []
    assert "--optim.warmup-epochs" in notes(configuration(optim={"warmup_epochs": 50.0}), 4000, {}, [1.0, 1.0], {})[0]


def test_the_record_of_a_run_gives_its_losses_and_its_first_scores(tmp_path):
    spool = Spool(tmp_path)
    spool.metrics(0, {"probe/knn_top1": 30.0})
    for step in (10, 20, 30):
        spool.metrics(step, {"train/loss": 1.0 / step if step < 30 else float("nan"), "train/lr": 0.1})
    spool.metrics(20, {"probe/knn_top1": 50.0})
    assert read_record(tmp_path) == ([0.1, 0.05], {"probe/knn_top1": 30.0})
