"""What a probe looks at: all of its images or a share, read or held."""

import shutil

import pytest
import torch

from pipelines.config import Config
from pipelines.data.feed import join_crew
from pipelines.data.shards import load_manifest
from pipelines.errors import UserError
from pipelines.training.probing import Prober
from pipelines.training.step import autocast


def configuration(**probe) -> Config:
    model = {"arch": "vit_tiny_patch16_224", "patch_size": 4, "width": 24, "depth": 1, "heads": 2,
             "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}  # fmt: skip
    data = {"image_size": (16, 16), "cpus_per_task": 0.5}
    return Config.model_validate({"data": data, "model": model, "batch": {"micro_size": 20}, "probe": probe})


@pytest.fixture
def prober(ray_local):
    """Makes a prober of a run of its own, in this process."""
    device = torch.device("cpu")

    def make(config: Config) -> Prober:
        return Prober(config, join_crew(0, 1, num_cpus=0.5), device, lambda: autocast("float32", device))

    return make


class Seen:
    """Stands for a model: its feature of an image is the mean, and it remembers which images it was shown."""

    width = 1

    def __init__(self):
        self.samples: list[int] = []

    def look(self, images_BCHW, sample_B):
        self.samples += [int(sample) for sample in sample_B if sample >= 0]
        return images_BCHW.mean(dim=(1, 2, 3))[:, None]


def looked_at(prober: Prober, train, **how) -> tuple[set[int], dict[str, float]]:
    """The images that a probe looks at, and its scores."""
    seen = Seen()
    scores = prober.validate(seen, train, train, **how)  # type: ignore[arg-type]
    assert len(seen.samples) == len(set(seen.samples))
    return set(seen.samples), scores


@pytest.mark.parametrize("samples", [0, 130])
def test_all_probes_but_the_last_look_at_a_share_of_the_images(prober, shards, samples):
    train = load_manifest(shards["train"])
    found = []
    for hold_mib in (0, 256):
        one = prober(configuration(samples=samples, early_share=0.3, val_share=0.3, hold_mib=hold_mib))
        assert one.hold(*one.looked_at(train, train)) == bool(hold_mib)
        found.append((looked_at(one, train), looked_at(one, train, last=True)))
    assert found[0] == found[1], "held images are the same as those that are read"
    (early, _), (last, _) = found[0]
    # One of the 300 cannot be read; it may be among those of the share.
    assert len(early) in (round(0.3 * (samples or 300)) - 1, round(0.3 * (samples or 300)))
    assert len(last) in ((samples or 300) - 1, samples)
    assert early < last


def test_the_next_run_in_a_process_looks_at_the_images_that_are_held_already(prober, shards, tmp_path):
    shutil.copytree(shards["train"], tmp_path / "train")
    train = load_manifest(str(tmp_path / "train"))
    first, second, other = (prober(configuration(crop_share=share, val_share=0.3)) for share in (0.875, 0.875, 1.0))
    assert first.hold(train)
    found = looked_at(first, train)
    shutil.rmtree(tmp_path / "train")
    assert second.hold(train)
    assert looked_at(second, train) == found
    # What could not be read is left out of both, and each says so.
    assert len(first.skipped) == 1
    assert second.skipped == first.skipped
    with pytest.raises(UserError):
        other.hold(train)
