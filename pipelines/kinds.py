"""What a folder of a storage holds: one name is one kind of thing, whichever command made it."""

import json
from typing import Literal, get_args

from pipelines import objects
from pipelines.errors import UserError
from pipelines.storage import Store

Kind = Literal["run", "search", "ablation", "trial", "transfer", "weights"]
TAG = "mae.kind"  # in run.json, of all but a pretraining run
WEIGHTS = "weights-"  # begins the name of the folder above the transfers of a file of weights

SHOWN: dict[Kind, str] = {
    "run": "a pretraining run",
    "search": "a search",
    "ablation": "an ablation",
    "trial": "a trial of a search or an ablation",
    "transfer": "a transfer",
    "weights": "the folder of the transfers of a file of weights",
}
_WAY_ON: dict[Kind, str] = {
    "run": "choose another --run",
    "search": "choose another --run",
    "ablation": "choose another --run",
    "trial": "move it away, or choose another --run",
    "transfer": "move it away",
    "weights": "rename the file of weights, or choose another --storage",
}


def kind_of(store: Store) -> Kind | None:
    """Returns what a folder holds, by its files; None where nothing has begun in it.

    Args:
        store: The folder, local or in an object store.
    """
    names = store.names()
    # 1. What begins a search and an ablation, before they have a record.
    if "search.json" in names:
        return "search"
    if "ablation.json" in names:
        return "ablation"
    # 2. The record says it; an ablation that only measures time has nothing else.
    if "run.json" in names:
        try:
            told = json.loads(store.read("run.json"))["tags"].get(TAG, "run")
        except (ValueError, KeyError):
            told = None
        if told in get_args(Kind):
            return told
    # 3. What was ended before it had a record: its place says it.
    *_, above, name = _parts(store)
    if "config.json" in names:
        return "trial" if above == "trials" else "transfer" if above == "transfer" else "run"
    return "weights" if name.startswith(WEIGHTS) and "transfer" in names else None


def refuse_other(store: Store, wanted: Kind) -> None:
    """Sees that a folder is free, or holds what a command wants to go on with; writes nothing.

    Args:
        store: The folder.
        wanted: What the command makes.

    Raises:
        UserError: It holds another kind of thing, or lies among the trials of a search or an ablation.
    """
    if store.is_web:
        return  # nothing is written there, as its command says
    found = kind_of(store)
    *_, above, name = _parts(store)
    if found not in (None, wanted):
        raise UserError(f"{store.shown()} is {SHOWN[found]}, not {SHOWN[wanted]}: {_WAY_ON[wanted]}")
    if wanted in ("run", "search", "ablation", "weights") and above == "trials":
        owner = kind_of(_above(_above(store)))
        if owner in ("search", "ablation"):
            raise UserError(
                f"{_above(store).shown()} is for the trials of {SHOWN[owner]}, not for {SHOWN[wanted]} '{name}': "
                "choose another storage"
            )


def _parts(store: Store) -> list[str]:
    return ["", *objects.split_query(store.location)[0].rstrip("/").split("/")]


def _above(store: Store) -> Store:
    place, query = objects.split_query(store.location)
    return Store(place.rstrip("/").rpartition("/")[0] + query)
