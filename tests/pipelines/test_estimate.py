"""What a run will take: the arithmetic by hand, the dry run against known speeds, and the command."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

from mae_core.flops import step_flops
from mae_core.images import ImageError
from pipelines.config import Config
from pipelines.data import readers
from pipelines.data.plan import Cut
from pipelines.data.shards import load_manifest
from pipelines.errors import UserError
from pipelines.estimate import main
from pipelines.estimation import Rates, estimate, plan_work
from pipelines.training import dry_run
from pipelines.training.build import build_model, make_stream

MODEL = {"patch_size": 8, "width": 12, "depth": 1, "heads": 1, "decoder_width": 8, "decoder_depth": 1}
TINY = Config.model_validate(
    {
        "data": {"image_size": (16, 16)},
        "model": {"arch": "vit_tiny_patch16_224", "decoder_heads": 1, **MODEL},
        "batch": {"global_size": 64, "micro_size": 16},
        "train": {"epochs": 2.5},
        "checkpoint": {"keep": 4},
    }
)
FLAGS = [
    "--data.image-size", "16", "16", "--model.arch", "vit_tiny_patch16_224", "--model.decoder-heads", "1",
    *(part for key, value in MODEL.items() for part in (f"--model.{key.replace('_', '-')}", str(value))),
    "--batch.global-size", "64", "--batch.micro-size", "16", "--train.steps", "10", "--seconds", "0.01",
]  # fmt: skip
CPU = torch.device("cpu")


def changed(section, **values):
    return Config.model_validate(TINY.model_dump() | {section: TINY.model_dump()[section] | values})


# ---- the arithmetic


def test_the_work_is_that_of_the_loop():
    work, model = plan_work(TINY, 300), build_model(TINY)
    assert (work.steps, work.images, work.epochs) == (12, 750, 2.5)  # 11.7 batches
    assert work.flops == step_flops(model)
    assert work.total_flops == 750 * step_flops(model).training
    assert work.kept_bytes == 4 * work.checkpoint_bytes
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert work.encoder_parameters + work.decoder_parameters == numbers
    assert work.decoder_parameters < work.encoder_parameters
    steps = plan_work(changed("train", steps=7), 300)
    assert (steps.steps, steps.images, steps.epochs) == (7, 448, 448 / 300)


def test_on_a_gpu_the_slower_one_sets_the_pace():
    work = plan_work(TINY, 300)
    rates = Rates(step_images_per_s=1000.0, decode_images_per_s=100.0, shared_cores=0.0, spare_cores=8.0)
    starved = estimate(work, rates, workers=4, price_per_hour=3.0)
    assert starved is not None
    assert (starved.images_per_s, starved.limit, starved.feeding_cores) == (3200.0, "decoding", 10.0)
    assert starved.flops_per_s == 3200.0 * work.flops.training
    assert starved.hours == pytest.approx(750 / 3200 / 3600)
    assert starved.cost == pytest.approx(4 * 3.0 * starved.hours)
    for spare, limit in ((11.0, "compute"), (None, None)):
        fed = estimate(work, Rates(1000.0, 100.0, 0.0, spare), workers=4)
        assert fed is not None
        assert (fed.images_per_s, fed.limit, fed.cost) == (4000.0, limit, 0.0)


def test_on_a_cpu_step_and_decoding_share_the_cores():
    found = estimate(plan_work(TINY, 300), Rates(100.0, 150.0, 2.0, None), workers=3)
    assert found is not None
    # 1/100 s for the step and 1/300 s for decoding: a quarter of the time
    assert found.images_per_s == pytest.approx(3 * 75.0)
    assert (found.limit, found.decode_share) == ("compute", pytest.approx(0.25))
    slow = estimate(plan_work(TINY, 300), Rates(100.0, 10.0, 2.0, None), workers=1)
    assert slow is not None
    assert slow.limit == "decoding"


def test_without_the_speed_of_a_step_there_is_no_estimate():
    assert estimate(plan_work(TINY, 300), Rates(None, 100.0, 0.0, 8.0), workers=1) is None


# ---- the dry run


def test_a_step_is_timed_with_its_accumulation_and_without_filler(monkeypatch):
    accumulated, clock = [], {"wall": 0.0, "cpu": 0.0}

    def slow_step(trainer, batches, lr):
        assert (lr, trainer.next_batch(batches)[0].shape) == (0.0, (11, 3, 16, 16))
        accumulated.append(trainer.cut.accumulation)
        clock["wall"] += 4 * trainer.cut.accumulation + 12
        clock["cpu"] += 2 * trainer.cut.accumulation + 6
        return torch.zeros(3)

    times = SimpleNamespace(perf_counter=lambda: clock["wall"], process_time=lambda: clock["cpu"])
    monkeypatch.setattr(dry_run, "time", times)
    monkeypatch.setattr(dry_run, "train_step", slow_step)
    cut = Cut(64, 11, 2)  # 6 micro-batches of 11, the last 2 rows of which fill up
    found = dry_run.measure_step(TINY, cut, CPU, threads=1, seconds=240)
    assert accumulated == [2, 2, *[3] * 10]
    # Each worker has 32 images and one optimiser step for its three micro-batches.
    assert found.images_per_s == pytest.approx(32 / 24)
    assert found.cpu_share == pytest.approx(0.5)
    # Where a step takes longer than there is time, the one after the first counts.
    assert dry_run.measure_step(TINY, cut, CPU, threads=2, seconds=1).images_per_s == pytest.approx(64 / 66 * 22 / 20)
    assert accumulated[12:] == [2, 2]


def test_steps_are_done_whatever_the_target(monkeypatch):
    told, train_step, threads = [], dry_run.train_step, torch.get_num_threads()

    def remembered(*args):
        told.append(train_step(*args))
        return told[-1]

    monkeypatch.setattr(dry_run, "train_step", remembered)
    config = changed("model", target="pca", target_components=4)
    assert dry_run.measure_step(config, Cut(16, 16, 1), CPU, threads=1, seconds=0.01).images_per_s > 0
    assert len(told) >= 2
    assert not any(skipped for _, _, skipped, _ in told)  # as steps of a target that has not been fitted would be
    assert torch.get_num_threads() == threads


def test_a_batch_that_does_not_fit_is_told(monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dry_run, "train_step", no_room)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a small GPU")
    with pytest.raises(UserError, match=r"micro-batch of 16 do not .* a small GPU: lower batch.micro_size"):
        dry_run.measure_step(TINY, Cut(16, 16, 1), CPU, threads=1, seconds=0.01)


def test_decoding_counts_what_can_be_read(shards, monkeypatch):
    config = changed("train", epochs=1.0)
    stream = make_stream(config, load_manifest(shards["train"]), 1)
    clock = SimpleNamespace(process_time=iter((3.0, 5.0)).__next__, monotonic=time.monotonic)
    monkeypatch.setattr(dry_run, "time", clock)
    assert dry_run.measure_decoding(stream, 5, seconds=60) == 299 / 2.0  # one of 300 is broken

    def broken(*_):
        raise ImageError("broken", "")

    monkeypatch.setattr(dry_run, "time", time)
    monkeypatch.setattr(readers, "decode", broken)
    with pytest.raises(UserError, match="none of the 300 images read so far"):
        dry_run.measure_decoding(stream, 5, seconds=0.01)


# ---- the command


def test_the_command_on_a_cpu(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "bfloat16_gain", lambda _: 3.4)
    out = tmp_path / "estimate.json"
    arguments = ["--data.train", shards["train"], *FLAGS, "--price-per-hour", "7", "--json", str(out)]
    assert main([*arguments, "--scale.workers", "2", "--scale.cpus-per-worker", "0.25"]) == 0
    found = json.loads(out.read_text())
    assert found["work"]["images"] == 640
    assert found["step"]["memory_bytes"] >= 0
    step, decode = found["rates"]["step_images_per_s"], found["rates"]["decode_images_per_s"]
    fed = decode * found["rates"]["shared_cores"]
    assert found["estimate"]["images_per_s"] == pytest.approx(2 / (1 / step + 1 / fed))
    assert found["estimate"]["cost"] == pytest.approx(14 * 640 / found["estimate"]["images_per_s"] / 3600)
    told = capsys.readouterr().out
    for title in ("parameters", "checkpoint", "arithmetic", "training step", "decoding", "limit", "time", "cost"):
        assert f"\n  {title} " in told
    assert "2 workers as fast as this one" in told
    assert "bfloat16 matrices are multiplied 3.4 times as fast as float32 ones on this processor" in told


def test_the_command_for_gpus_where_there_are_none(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    out = tmp_path / "estimate.json"
    arguments = ["--data.train", shards["train"], *FLAGS, "--scale.gpu", "--json", str(out)]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "not measured: scale.gpu is set and there is no GPU here" in told
    assert "\n  time" not in told
    found = json.loads(out.read_text())
    assert (found["step"], found["estimate"]) == (None, None)
    assert main([*arguments, "--images-per-s", "500"]) == 0
    assert "500.0 images/s a worker, as given" in capsys.readouterr().out
    found = json.loads(out.read_text())["estimate"]
    assert found["hours"] == pytest.approx(640 / 500 / 3600)
    assert found["limit"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"data.train is not given: name shards with --data.train DIR"),
        (["--price-per-hour", "-1"], r"price_per_hour: .*greater than or equal to 0"),
        (["--price-per-hours", "1"], r"did you mean --price-per-hour"),
        (["--data.train", "nowhere"], r"nowhere"),
        (["--data.train", "x", "--json", "/no/such/folder/x.json"], r"--json /no/such/folder/x.json: .*no such folder"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        main(arguments)
    assert "\n" not in str(error.value)
