"""Pretrains a Vision Transformer as a masked autoencoder on WebDataset shards.

    python -m pipelines.pretrain --config pipelines/recipes/digits.toml
    ray job submit --working-dir . -- python pipelines/pretrain.py --config pipelines/recipes/digits.toml

Every key of the configuration is a flag (``--model.mask-ratio 0.6``) and a key of the TOML file. Submitting the
same ``run.name`` again continues the run from its last checkpoint; a finished one says so.
"""

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines import provenance
from pipelines.cli import parse_with_file, to_toml
from pipelines.commands import command_line
from pipelines.config import Config, flat, identity, identity_hash, total_steps, warmup_note, younger_defaults
from pipelines.data.shards import Manifest, load_manifest, need_labels, need_same_classes
from pipelines.early import check_early
from pipelines.errors import FAILED, USAGE_ERROR, UserError, run_command
from pipelines.kinds import refuse_other
from pipelines.lease import Lease, check_of, hold
from pipelines.runs import finished_when
from pipelines.spool import Spool, Status
from pipelines.storage import Store, recordable
from pipelines.tracking import RunDescription, create_run, resolve_tracking_uri, send, send_rest, shown_record
from pipelines.training.job import Job
from pipelines.training.runfolder import RunFolder
from pipelines.weights_file import digest, local_file

# PyTorch, timm and Ray are imported in functions: who mistypes a flag need not wait seconds for them.
PROG = command_line("pipelines.pretrain")


def read_config(argv: Sequence[str] | None = None) -> Config:
    """The configuration from ``--config FILE``, overridden by flags.

    Raises:
        UserError: An unknown key or flag, or a value that does not fit.
    """
    return parse_with_file(Config, prog=PROG, argv=argv, default=Config())


def resolve(config: Config) -> Config:
    """The configuration with every path absolute, since workers run in other folders and on other machines.

    Weights to begin with are known by what they hold.

    Raises:
        UserError: A file of weights is not there.
    """
    values = config.model_dump()
    values["run"]["storage"] = recordable(config.run.storage, "run.storage")
    places = (("data", "train"), ("probe", "train"), ("probe", "test"), ("run", "init_from"), ("log", "ids_folder"))
    for section, key in places:
        if values[section][key]:
            values[section][key] = recordable(values[section][key], f"{section}.{key}")
    if config.run.init_from and not config.run.init_digest:
        with local_file(config.run.init_from, "run.init_from") as path:
            values["run"]["init_digest"] = digest(path)
    return Config.model_validate(values)


def check(config: Config) -> tuple[Manifest, Manifest | None, Manifest | None]:
    """Finds what is wrong before anything starts.

    Returns:
        The manifests of the training images, and of the probes' training and test images.

    Raises:
        UserError: Something is.
    """
    if not config.data.train:
        raise UserError(f"data.train is not given: name shards with --data.train DIR (see {PROG} --help)")
    check_early(config)
    if Store(config.run.storage).is_web:
        raise UserError(f"run.storage: nothing can be written to {config.run.storage}; name a folder, s3:// or gs://")
    if config.log.ids and not Store(config.log.ids_folder or config.run.storage).is_local:
        raise UserError(
            "log.ids writes to a local run.storage only: name a folder that all workers share, log.ids_folder"
        )
    train = load_manifest(config.data.train)
    total_steps(config, train.num_samples)
    probes = [load_manifest(where) if where else None for where in (config.probe.train, config.probe.test)]
    for name, manifest in zip(("probe.train", "probe.test"), probes, strict=True):
        if manifest is not None:
            need_labels(name, manifest, "a probe")
    labelled, test = probes
    if labelled and test:
        need_same_classes("probe.train", labelled, "probe.test", test)
    from pipelines.training.build import check_initial_weights, check_model
    from pipelines.training.scores import check_classes

    for name, manifest in zip(("probe.train", "probe.test"), probes, strict=True):
        if manifest is not None:
            check_classes(name, manifest)

    check_model(config)
    if config.run.init_from and (line := check_initial_weights(config)):
        print(line, flush=True)
    return train, labelled, test


def open_run(config: Config, data_digest: str) -> dict[str, Any] | None:
    """Makes the run's folder, or finds the run that its name continues.

    Returns:
        The result of a run that has finished already, else None.

    Raises:
        UserError: A run of this name has another configuration.
    """
    from pipelines.training import checkpoint

    store = Store(config.run.storage).child(config.run.name)
    mine = identity(config, data_digest)
    if store.exists("identity.json"):
        theirs = json.loads(store.read("identity.json"))
        changed = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        # A run that never reached a checkpoint has nothing that a change could spoil.
        started = bool(checkpoint.steps(store.child("checkpoints")))
        if changed and started and not config.run.allow_change:
            key, defaults = changed[0], younger_defaults()
            mine, theirs = defaults | mine, defaults | theirs
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise UserError(
                f"run '{config.run.name}' exists with another configuration: {key} was {theirs.get(key)!r}, is now "
                f"{mine.get(key)!r}{more}; choose another --run, or --run.allow-change to continue it so"
            )
        if not changed and store.exists("result.json"):
            result = json.loads(store.read("result.json"))
            # That of an earlier configuration, which this run went on from, is not this one's.
            if result["identity"] == identity_hash(mine):
                return result
    store.write("config.json", config.model_dump_json(indent=2) + "\n")
    title = f"Resolved configuration of the run '{config.run.name}'. Feed it back with --config."
    store.write("config.toml", to_toml(config, title))
    store.write("identity.json", json.dumps(mine, indent=2))
    return None


@dataclass(frozen=True)
class Images:
    """The data sets of a run.

    Args:
        train: The images to pretrain on.
        labelled: Those that the probes learn from, or None.
        test: Those that the probes read once, at the end, or None.
    """

    train: Manifest
    labelled: Manifest | None
    test: Manifest | None


def describe(config: Config, images: Images, parent_run_id: str | None = None) -> RunDescription:
    """What MLflow is told about the run before it starts."""
    data = {"train": images.train, "probe_train": images.labelled, "probe_test": images.test}
    return RunDescription(
        experiment=config.run.experiment,
        name=config.run.name,
        params=flat(config),
        tags={
            **provenance.tags(),
            "data.digest": images.train.digest,
            "identity": identity_hash(identity(config, images.train.digest)),
            "storage": config.run.storage,
        },
        datasets=provenance.dataset_inputs(data),
        parent_run_id=parent_run_id,
    )


def pretrain(config: Config, images: Images, console: Any, *, here: bool = False, **options: Any) -> None:
    """Runs the workers to the run's end; its MLflow run and its folder are there.

    Args:
        config: The resolved configuration.
        images: The data sets.
        console: Where the workers tell.
        here: Whether the only worker is this process.
        options: Those of ``Job``.

    Raises:
        UserError: It failed by what the user can mend.
        PretrainingError: It failed otherwise.
    """
    import ray.train

    from pipelines.training.launch import run_here, run_workers
    from pipelines.training.loop import train_worker
    from pipelines.training.lost import LostWorkers
    from pipelines.training.memory import ran_out, setting

    store = Store(config.run.storage).child(config.run.name)
    error = ""
    try:
        job = Job(config, images.train, images.labelled, images.test, console, **options)
        if here:
            run_here(lambda: train_worker(job), config.scale)
        else:
            run_workers(lambda: train_worker(job), config.scale, store, [LostWorkers(console, config)])
    except ray.train.TrainingFailedError as failed:
        error = str(failed)
    failure = ray.get(console.failure.remote())
    if failure is None and not error:
        return
    check_of(options.get("lease"))()
    reason, code = failure or (error, FAILED)
    with contextlib.suppress(OSError):  # the disk may be what failed
        store.write("error.log", reason)
    with contextlib.suppress(OSError):
        end_record(store, "FAILED", followed=options.get("followed", False))
    if code == USAGE_ERROR:
        raise UserError(reason)
    last = [line for line in reason.splitlines() if line.strip()][-1].strip()
    if ran_out(reason):
        last = f"a node ran out of memory, and Ray killed what it does not replace: {setting(config)}"
    raise PretrainingError(f"{last} (all of it: {store.path('error.log')})", code)


def end_record(store: Store, status: Status, *, followed: bool = False) -> None:
    """Writes how a run ended where its workers could not, and sends the record.

    Args:
        store: The run's folder.
        status: How it ended.
        followed: Whether somebody else sends it.
    """
    # Anew: where the storage is remote, the workers have sent theirs since.
    folder = RunFolder(store)
    Spool(folder.path).status(status)
    if not followed:
        send(folder.path, timeout_s=10.0)
    folder.push()


class PretrainingError(Exception):
    """A run failed by what is no mistake of the user's; the text says why, in one line.

    Args:
        code: What the command exits with.
    """

    def __init__(self, text: str, code: int = FAILED):
        super().__init__(text)
        self.code = code


def summary(config: Config, result: dict[str, Any], tracking_uri: str, seconds: float | None) -> str:
    """What a person wants to know at the end.

    Args:
        config: The resolved configuration.
        result: What the run has come to.
        tracking_uri: Where its record is.
        seconds: What it took; None: it had finished before.
    """
    from pipelines.training.unreadable import told

    scores = result["scores"]
    folder = Store(config.run.storage).child(config.run.name)
    if seconds is None:
        when = finished_when(folder)
        lines = [f"run '{config.run.name}' has finished already{when}: {result['step']} steps; nothing to do"]
    else:
        lines = ["", f"run '{config.run.name}' finished: {result['step']} steps in {seconds / 60:.1f} min"]
    if "test/knn_top1" in scores:
        lines.append("top-1 on the test images, of features from")
        lines.append(f"{'':24}{'kNN':>10}{'linear probe':>16}")
        for title, prefix in (("the random encoder", "test/random_"), ("the pretrained encoder", "test/")):
            if f"{prefix}knn_top1" in scores:
                knn, linear = scores[f"{prefix}knn_top1"], scores[f"{prefix}linear_top1"]
                lines.append(f"  {title:22}{knn:>8.1f} %{linear:>14.1f} %")
    else:
        lines += [f"  {name} {value:.2f}" for name, value in scores.items()]
    # Runs that ended before there were notes have none.
    lines += [f"note: {note}" for note in result.get("notes", ())]
    if result["skipped"]:
        times = told(Counter(result["skipped"]))
        lines.append(f"could not be read: {times} (each is listed in {folder.path('skipped.jsonl')})")
    if config.log.pictures:
        picture = f"pictures/reconstruction-{result['step']:08d}.png"
        lines.append(f"picture    {folder.path(picture)}")
    lines.append(f"run        {folder.location}")
    if line := shown_record(RunFolder(folder).path, tracking_uri):
        lines.append(line)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    config = resolve(read_config(argv))
    store = Store(config.run.storage).child(config.run.name)
    refuse_other(store, "run")
    images = Images(*check(config))
    with hold(store, f"run '{config.run.name}'", "run") as lease:
        return run(config, images, lease)


def run(config: Config, images: Images, lease: Lease) -> int:
    """Runs it to its end, or finds that it is there already; returns the command's exit code."""
    from pipelines.console import Printer, make_console
    from pipelines.ray_session import connect
    from pipelines.stopping import StoppedError, do_until_stopped, take_signals
    from pipelines.training.launch import check_resources
    from pipelines.training.memory import watch_memory

    started = time.perf_counter()
    train = images.train
    tracking_uri = resolve_tracking_uri(config.run.storage)
    result = open_run(config, train.digest)
    store = Store(config.run.storage).child(config.run.name)
    if result is not None:
        print(summary(config, result, tracking_uri, None))
        return 0
    with connect(address=config.scale.address), take_signals() as signals:
        scale = check_resources(config.scale, config.data.cpus_per_task)
        config = config.model_copy(update={"scale": scale})
        folder = RunFolder(store)
        create_run(folder.path, describe(config, images), tracking_uri=tracking_uri)
        folder.push()
        print(
            f"run '{config.run.name}': {train.num_samples:,} images, {total_steps(config, train.num_samples):,} steps "
            f"of {config.batch.global_size} on {scale.workers} workers"
            f"{f', each with {scale.cpus_per_worker:g} CPUs' if scale.cpus_per_worker < 1 else ''}",
            flush=True,
        )
        if note := warmup_note(config, train.num_samples):
            print(f"warning: {note}", flush=True)
        console = make_console()
        printer = Printer(console)
        try:
            with watch_memory(console, config):
                do_until_stopped(lambda: pretrain(config, images, console, lease=lease), console, signals)
        except PretrainingError as error:
            print(f"error: training failed: {error}", file=sys.stderr)
            return error.code
        except StoppedError as stopped:
            if not stopped.is_recorded:
                with contextlib.suppress(OSError):
                    end_record(store, "KILLED")
            print(f"run '{config.run.name}' {stopped}; the same command continues it", file=sys.stderr)
            return stopped.code
        finally:
            printer.stop()
    left = send_rest(folder.path, timeout_s=30.0) if store.is_local else None
    result = json.loads(store.read("result.json"))
    print(summary(config, result, tracking_uri, time.perf_counter() - started))
    if left is not None and left.left:
        later = command_line("pipelines.sync", config.run.name, storage=config.run.storage)
        print(f"{left.left} lines of the record are not in MLflow yet: {later}")
    return 0


if __name__ == "__main__":
    run_command(main)
