"""Figure 9 of the paper: partial fine-tuning of a finished run, by a sweep of ``pipelines.transfer``."""

import json
import os
from collections.abc import Mapping, Sequence

from pipelines import transfer
from pipelines.config import Config, flat
from pipelines.errors import UserError
from pipelines.storage import Store, absolute
from pipelines.tracking import resolve_tracking_uri
from pipelines.transfer_config import units
from pipelines.transfer_identity import as_pretrained, identity
from tune.sections import Measured
from tune.tables import Row, encoder_depth


def tune(
    run: str,
    storage: str,
    config: Config,
    rows: Sequence[Row],
    *,
    file: str,
    seeds: int,
    steps: int,
    digests: Mapping[str, str],
) -> list[Measured]:
    """Tunes more and more blocks; what is there already is not done again.

    Args:
        run: The pretraining run.
        storage: The folder that holds it.
        config: The recipe: its probes' data are learned from and tested on.
        rows: Of the figure.
        file: TOML file of the transfer; empty: the paper's recipe.
        seeds: Tunings of each.
        steps: Of the run.
        digests: Of what is learned from (train) and tested on (test).

    Raises:
        UserError: A transfer has failed, or what is asked for does not fit.
    """
    # The record of the transfers stands where that of the run does.
    os.environ.setdefault("MLFLOW_TRACKING_URI", resolve_tracking_uri(config.run.storage))
    asked = arguments(run, storage, config, file, seeds)
    if transfer.main(asked):
        raise UserError(f"the partial fine-tuning of {run} has failed: see above")
    above, scores = Store(storage).child(run).child("transfer"), dict[str, Mapping[int, float]]()
    done = [above.child(name) for name in above.names() if above.child(name).exists("result.json")]
    for unit in units(as_pretrained(transfer.read_transfer(asked), config), encoder_depth(config)):
        wanted = identity(unit, steps, dict(digests))
        for store in done:
            if json.loads(store.read("identity.json")) == wanted:
                label = "all" if unit.protocol == "finetune" else f"{unit.blocks[0]:g}"
                scores[label] = {one["seed"]: one["test"] for one in json.loads(store.read("result.json"))["seeds"]}
    return [Measured(row, False, scores.get(row.label, {}), {}, 0.0) for row in rows]


def arguments(run: str, storage: str, config: Config, file: str, seeds: int) -> list[str]:
    """The command of the transfer, with the places and the workers of the recipe."""
    asked = ["--config", absolute(file)] if file else []
    asked += ["--run", run, "--storage", storage, "--protocol", "partial", "--sweep"]
    asked += ["--data.train", config.probe.train, "--data.test", config.probe.test]
    asked += ["--seeds", *(str(seed) for seed in range(seeds))]
    for key, value in flat(config.scale).items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            asked.append(f"--scale.{flag}" if value else f"--scale.no-{flag}")
        else:
            asked += [f"--scale.{flag}", str(value)]
    return asked
