"""Small searches for tests: their recipe, their arguments, and what their journal says."""

import json
from collections.abc import Mapping
from pathlib import Path

import ray

RECIPE = """
[data]
image_size = [16, 16]
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
cpus_per_task = 0.5
[model]
arch = "vit_tiny_patch16_224"
patch_size = 4
width = 24
depth = 2
heads = 2
decoder_width = 16
decoder_depth = 1
decoder_heads = 2
[batch]
global_size = 40
micro_size = 20
[optim]
base_lr = 1e-2
warmup_epochs = 1.0
[train]
steps = 24
[scale]
cpus_per_worker = 0.5
[probe]
val_share = 0.3
[log]
every = 6
"""
SPACE = """
["model.mask_ratio"]
values = [0.25, 0.5, 0.75]
["model.decoder_width"]
values = [16, 32]
"""


def arguments(
    folder: Path, shards: Mapping[str, str], *more: str, space: str = SPACE, name: str = "found"
) -> list[str]:
    """Those of a search in a folder; the space is given as text."""
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "space.toml").write_text(space)
    files = ["--config", str(folder / "recipe.toml"), "--space", str(folder / "space.toml")]
    data = ["--data.train", shards["train"], "--probe.train", shards["train"]]
    return [*files, *data, "--run.storage", str(folder / "runs"), "--run.name", name, *more]


def journal(folder):
    """What each trial has come to: its reports, and its last state."""
    found = {}
    for line in (folder / "journal.jsonl").read_text().splitlines():
        value = json.loads(line)
        known = found.setdefault(value["trial"], {"steps": [], "values": value["values"]})
        known |= {"state": value["state"], "reason": value.get("reason", "")}
        known["steps"] += [value["step"]] if "step" in value else []
    return found


def left_over():
    """Places that some run still claims."""
    return [one for one in ray.util.placement_group_table().values() if one["state"] != "REMOVED"]
