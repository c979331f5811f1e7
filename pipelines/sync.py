"""Sends MLflow what it lacks of the records of a run, its transfers and trials: a server was down, a trainer killed.

python -m pipelines.sync NAME [--storage runs] [--tracking-uri http://...]
"""

import difflib
import os
from pathlib import Path
from typing import Annotated

import pydantic
import tyro

from pipelines.cli import parse
from pipelines.commands import command_line
from pipelines.config import also
from pipelines.errors import UserError, run_command
from pipelines.spool import SPOOL_FILE, redact
from pipelines.storage import Store, absolute
from pipelines.tracking import RUN_FILE, RunRecord, absolute_tracking_uri, adopt, quiet_environment, recorded

PROG = command_line("pipelines.sync")


class Args(pydantic.BaseModel):
    """Send what MLflow does not have yet of the records of a run, its transfers and trials."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Annotated[str, tyro.conf.Positional] = ""
    """The run's name."""
    run: Annotated[str, also("--run.name")] = ""
    """The run's name, spelt as in other commands."""
    storage: Annotated[str, also("--run.storage")] = "runs"
    """The folder that holds the runs."""
    tracking_uri: str = ""
    """The MLflow to send to; empty: MLFLOW_TRACKING_URI, else the one that the run began with."""


def main() -> int:
    """Sends the records of one run, its transfers and trials, and says what it sent.

    Scores of transfers that the run lacks are noted on it first.
    """
    args = parse(Args, prog=PROG)
    if bool(args.name) == bool(args.run):
        raise UserError(f"name one run, as NAME or as --run NAME (see {PROG} --help)")
    folder = run_folder(args.name or args.run, args.storage)
    asked = absolute_tracking_uri(args.tracking_uri) if args.tracking_uri else ""

    # Not before the arguments are known to be right, as importing MLflow takes seconds, nor without these settings.
    os.environ.update(quiet_environment())
    from pipelines.sender import Sender
    from pipelines.transfer_record import note_missing

    for line in note_missing(Store(str(folder))):
        print(line)
    problems: list[str] = []
    for one in recorded(folder):
        if one != folder:
            adopt(one, folder)
        uri = asked or tracking_uri(one)
        sent = Sender(one, uri, may_create=True).send()
        name = one.relative_to(folder.parent).as_posix()
        print(f"{name}: sent {sent.points} points and {sent.files} files to {redact(uri)}, {sent.left} lines left")
        if sent.problem:
            problems.append(f"{sent.problem}: the record is safe in {one / SPOOL_FILE}, run this again later")
    if problems:
        more = f" (and {len(problems) - 1} more like this)" if len(problems) > 1 else ""
        raise UserError(problems[0] + more)
    return 0


def run_folder(name: str, storage: str) -> Path:
    """The folder of a run that has a record, or transfers that have one.

    Raises:
        UserError: There is no such run; the text lists those with a similar name.
    """
    store = Store(absolute(storage))
    if not store.is_local:
        raise UserError(f"{storage} is an object store: copy {storage}/{name} into a folder here, and sync that")
    folder = store.local(name)
    if not recorded(folder):
        runs = [other for other in store.names() if store.exists(f"{other}/{RUN_FILE}")]
        near = difflib.get_close_matches(name, runs, n=5, cutoff=0.5)
        found = f"did you mean {', '.join(near)}?" if near else f"found {', '.join(runs[:5]) or 'no run at all'}"
        raise UserError(f"no run '{name}' with a {RUN_FILE} in {store.location}: {found}")
    return folder


def tracking_uri(folder: Path) -> str:
    """Where a run's record goes when nobody says otherwise."""
    from_environment = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    return absolute_tracking_uri(from_environment) if from_environment else RunRecord.read(folder).tracking_uri


if __name__ == "__main__":
    run_command(main)
