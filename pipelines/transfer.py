"""Scores a pretrained encoder on labelled images, and notes the score on its pretraining run.

    python -m pipelines.transfer --run cells --protocol linear-fast --data.train cells/train --data.test cells/test
    python -m pipelines.transfer --weights mae.pth --protocol finetune --data.train cells/train --data.test ...

The same command again continues a transfer that was stopped; a finished one says its result.
"""

import contextlib
import difflib
import hashlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.amounts import flops
from pipelines.cli import parse_with_file, to_toml
from pipelines.commands import command_line
from pipelines.config import Config
from pipelines.data.shards import Manifest, load_index, load_manifest, need_labels, need_same_classes
from pipelines.early import check_gpus
from pipelines.errors import USAGE_ERROR, UserError, run_command
from pipelines.kinds import WEIGHTS, refuse_other
from pipelines.lease import Lease, hold
from pipelines.runs import final_step, find_run, finished_when
from pipelines.spool import Spool
from pipelines.storage import Store, absolute
from pipelines.tracking import create_run, resolve_tracking_uri, send, shown_record
from pipelines.training.runfolder import RunFolder
from pipelines.transfer_config import Protocol, Transfer, TransferData, TransferTrain, metric, recipe, units
from pipelines.transfer_identity import as_pretrained, dataset_name, identity, score_name

if TYPE_CHECKING:
    import torch

# PyTorch, timm and Ray are imported in functions: who mistypes a flag need not wait seconds for them.
PROG = command_line("pipelines.transfer")
_PROTOCOLS: tuple[str, ...] = Protocol.__args__  # type: ignore[attr-defined]


class TransferFailedError(RuntimeError):
    """A transfer failed by what the user cannot mend."""


def read_transfer(argv: Sequence[str] | None = None) -> Transfer:
    """The protocol's recipe, overridden by ``--config FILE``, overridden by flags; every path absolute.

    Raises:
        UserError: An unknown key or flag, a value that does not fit, or something that is missing.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    asked = "linear-fast"
    for before, argument in itertools.pairwise(["", *arguments]):
        if before == "--protocol":
            asked = argument
        elif argument.startswith("--protocol="):
            asked = argument.partition("=")[2]
    if asked not in _PROTOCOLS:
        near = difflib.get_close_matches(asked, _PROTOCOLS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(_PROTOCOLS)}"
        raise UserError(f"--protocol {asked} is unknown: {hint}")
    values = recipe(asked)
    default = Transfer(
        protocol=values["protocol"], data=TransferData(**values["data"]), train=TransferTrain(**values["train"])
    )
    transfer = parse_with_file(Transfer, prog=PROG, argv=arguments, default=default)
    if bool(transfer.run) == bool(transfer.weights):
        raise UserError(f"give either --run NAME or --weights FILE (see {PROG} --help)")
    if not transfer.data.train or not transfer.data.test:
        raise UserError(f"give labelled shards with --data.train and --data.test (see {PROG} --help)")
    values = transfer.model_dump()
    values["storage"] = absolute(transfer.storage)
    for key in ("train", "test"):
        values["data"][key] = absolute(values["data"][key])
    if transfer.weights:
        values["weights"] = absolute(transfer.weights)
    return Transfer.model_validate(values)


def check_labels(train: Manifest, test: Manifest) -> None:
    """Sees that the test images' classes are known to the training images.

    Raises:
        UserError: They are not, or there are no labels.
    """
    for name, manifest in (("data.train", train), ("data.test", test)):
        need_labels(name, manifest, "a transfer")
    _check_split(train)
    need_same_classes("data.train", train, "data.test", test)


def check_masks(transfer: Transfer, train: Manifest, test: Manifest) -> int:
    """Sees that there are masks to learn from and to score on; returns how many classes they have.

    Raises:
        UserError: There are none, or it is not known how many classes they have, or there are more.
    """
    for name, manifest in (("data.train", train), ("data.test", test)):
        if not any(load_index(manifest, shard).mask_size_S.any() for shard in range(len(manifest.shard_names))):
            raise UserError(
                f"{name}: the shards in {manifest.location} have no masks: pack with make_shards --masks, or where the "
                "tars hold .mask.png members, run python -m pipelines.check_shards DIR --write"
            )
    _check_split(train)
    num_classes = transfer.data.num_classes or train.mask_classes
    if not num_classes:
        raise UserError(
            "data.train: its manifest does not say how many classes the masks have: give --data.num-classes"
        )
    for name, manifest in (("data.train", train), ("data.test", test)):
        if manifest.mask_classes > num_classes:
            raise UserError(
                f"{name}: the masks have {manifest.mask_classes} classes, and {num_classes} are learned: "
                f"give --data.num-classes {manifest.mask_classes}"
            )
    return num_classes


def _check_split(train: Manifest) -> None:
    if train.num_samples < 2:
        raise UserError(f"data.train: {train.num_samples} images cannot be split into learning and validation")


def check_classifier(transfer: Transfer, config: Config, num_classes: int) -> None:
    """Builds the classifier's shapes without its memory.

    Raises:
        UserError: Image size or blocks do not fit the encoder.
    """
    import torch

    from mae_core.augment import check_policy
    from mae_core.classifier import Classifier, freeze
    from pipelines.training.build import build_model

    size = transfer.data.image_size if min(transfer.data.image_size) > 0 else config.data.image_size
    try:
        with torch.device("meta"):
            model = Classifier(build_model(config), num_classes, image_size=size)
            if transfer.protocol == "partial":
                freeze(model, transfer.blocks[0])
        if transfer.data.auto_augment:
            check_policy(transfer.data.auto_augment)
    except ValueError as error:
        raise UserError(str(error)) from None


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    transfer = read_transfer(argv)
    apart = Store(transfer.storage).child(f"{WEIGHTS}{Path(transfer.weights).stem}")
    # What is known at once is said at once.
    if transfer.weights:
        refuse_other(apart, "weights")
    else:
        find_run(transfer.storage, transfer.run)
    check_gpus(transfer.scale)
    data = load_manifest(transfer.data.train), load_manifest(transfer.data.test)
    if transfer.protocol == "segment":
        classes = tuple(map(str, range(check_masks(transfer, *data))))
    else:
        check_labels(*data)
        classes = data[0].classes

    import ray

    from pipelines.ray_session import connect
    from pipelines.training.launch import check_resources
    from pipelines.training.scores import read_scored
    from pipelines.transfer_record import finish, note_on_parent, read_result
    from pipelines.transfer_source import normalised, source

    parent, config, state, step = source(transfer)
    transfer = as_pretrained(transfer, config)
    config = normalised(transfer, config)
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    asked = units(transfer, depth)
    for unit in asked:
        check_classifier(unit, config, len(classes))
    above = parent or apart
    digests: dict[str, Any] = {"train": data[0].digest, "test": data[1].digest}
    if transfer.protocol == "segment":
        digests["num_classes"] = len(classes)
    if transfer.weights:
        digests["weights"] = hashlib.sha256(Path(transfer.weights).read_bytes()).hexdigest()
    scored: list[tuple[Transfer, dict[str, Any]]] = []
    with contextlib.ExitStack() as stack:
        for unit in asked:
            began = time.perf_counter()
            values = identity(unit, step, digests)
            digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
            store = above.child("transfer").child(f"{dataset_name(unit)}-{score_name(unit)}-{digest}")
            result, seconds = read_result(store, unit), None
            if result:
                print(f"{score_name(unit)} has finished already{finished_when(store)}; nothing to do")
            else:
                if any(read_scored(store, seed) is None for seed in unit.seeds):
                    if not ray.is_initialized():
                        stack.enter_context(connect(address=transfer.scale.address))
                    scale = check_resources(transfer.scale, transfer.data.cpus_per_task)
                    try:
                        with hold(store, f"the transfer {score_name(unit)}", "transfer") as lease:
                            _run(
                                unit.model_copy(update={"scale": scale}),
                                config,
                                state,
                                data,
                                len(classes),
                                parent,
                                store,
                                values,
                                lease,
                            )
                    except TransferFailedError as failed:
                        print(f"error: {score_name(unit)} failed: {failed}", file=sys.stderr)
                        return 1
                result, seconds = finish(unit, store, classes), time.perf_counter() - began
            print(told(unit, result, store, seconds), flush=True)
            if parent is not None:
                note_on_parent(parent, store)
            scored.append((unit, result))
    if len(asked) > 1:
        print(f"\nplot       {plot(transfer, parent, above, scored)}")
    return 0


def plot(transfer: Transfer, parent: Store | None, above: Store, scored: list[tuple[Transfer, dict[str, Any]]]) -> str:
    """Draws the scores over what was varied, for the pretraining run's record too; returns the picture's path."""
    from pipelines.plots import Point, draw_scores

    varied = {
        "labels": lambda unit: unit.data.label_fraction[0],
        "visible": lambda unit: unit.visible[0],
        "blocks": lambda unit: inf if unit.protocol in ("finetune", "scratch") else unit.blocks[0],
    }
    titles = {"labels": "share of the labels", "visible": "share of visible patches", "blocks": "blocks that train"}
    name = next((name for name, of in varied.items() if len({of(unit) for unit, _ in scored}) > 1), "blocks")
    lines: dict[str, list[Point]] = {}
    scored_by = metric(transfer)
    for unit, result in scored:
        x, scores = varied[name](unit), result["scores"]
        line = "from scratch" if unit.protocol == "scratch" else transfer.protocol
        half = scores[f"test/{scored_by}_interval"]
        point = Point(x, "all" if x == inf else f"{x:g}", scores[f"test/{scored_by}"], half,
                      scores["time/train_s"] if scores["train/flops"] else 0.0, scores["train/flops"])  # fmt: skip
        lines.setdefault(line, []).append(point)
    title = f"{transfer.run or Path(transfer.weights).stem} on {dataset_name(transfer)}"
    file = f"transfer-{dataset_name(transfer)}-{transfer.protocol}-{name}.png"
    with tempfile.TemporaryDirectory() as folder:
        y_title = {"top1": "top-1, %", "miou": "mIoU, %"}[scored_by]
        draw_scores(lines, titles[name], y_title, title, Path(folder) / file)
        picture = (Path(folder) / file).read_bytes()
    above.write(f"pictures/{file}", picture)
    if parent is not None and final_step(parent) is not None:
        record = RunFolder(parent)
        (record.path / "pictures").mkdir(exist_ok=True)
        (record.path / "pictures" / file).write_bytes(picture)
        spool = Spool(record.path)
        spool.artifact(f"pictures/{file}", "transfer")
        spool.close()
        send(record.path, timeout_s=30.0)
        record.push()
    return above.path(f"pictures/{file}")


def _run(
    transfer: Transfer,
    config: Config,
    state: "dict[str, torch.Tensor]",
    data: tuple[Manifest, Manifest],
    num_classes: int,
    parent: Store | None,
    store: Store,
    values: dict[str, Any],
    lease: Lease,
) -> None:
    """Learns and scores with the seeds that have no score yet.

    Raises:
        UserError: It failed by what the user can mend.
        TransferFailedError: It failed otherwise.
    """
    import ray
    import ray.train

    from pipelines.console import Printer, make_console
    from pipelines.training.launch import run_workers
    from pipelines.training.transfer import transfer_worker
    from pipelines.training.transfer_worker import TransferJob
    from pipelines.transfer_record import describe

    train, test = data
    store.write("config.json", transfer.model_dump_json(indent=2) + "\n")
    store.write("config.toml", to_toml(transfer, "A resolved transfer. Feed it back with --config."))
    store.write("identity.json", json.dumps(values, indent=2))
    folder = RunFolder(store)
    uri = resolve_tracking_uri(transfer.storage)
    create_run(folder.path, describe(transfer, data, parent), tracking_uri=uri)
    folder.push()
    console = make_console()
    printer = Printer(console)
    # Large ones do not fit into what travels with a function.
    job = TransferJob(transfer, config, ray.put(state), train, test, num_classes, store, console, lease)
    print(f"{score_name(transfer)}: {train.num_samples:,} images to learn from, {test.num_samples:,} to test on")
    error = ""
    try:
        run_workers(lambda: transfer_worker(job), transfer.scale, store)
    except ray.train.TrainingFailedError as failed:
        error = str(failed).strip().splitlines()[-1]
    finally:
        printer.stop()
    failure = ray.get(console.failure.remote())
    if failure or error:
        lease.check()
        with contextlib.suppress(OSError):
            Spool(folder.path).status("FAILED")
            send(folder.path, timeout_s=10.0)
            folder.push()
        if failure and failure[1] == USAGE_ERROR:
            raise UserError(failure[0])
        raise TransferFailedError(failure[0] if failure else error)


def told(transfer: Transfer, result: dict[str, Any], store: Store, seconds: float | None) -> str:
    """What a person wants to know at the end.

    Args:
        transfer: What was scored.
        result: What it has come to.
        store: Its folder.
        seconds: What it took; None: it had finished before.
    """
    took = f", in {seconds:.0f} s" if seconds is not None else ""
    scores, name = result["scores"], metric(transfer)
    half = scores[f"test/{name}_interval"]
    spread = f" +- {half:.2f} (95 % interval over {len(result['seeds'])} seeds)" if half is not None else ""
    lines = [
        "",
        f"{score_name(transfer)} of {transfer.run or transfer.weights} on {dataset_name(transfer)}{took}",
        f"  validation {scores[f'val/{name}']:.2f} %{' mIoU' if name == 'miou' else ''}",
        f"  test       {scores[f'test/{name}']:.2f} %{spread}; read at the end, nothing is chosen there",
    ]
    if result["tried"]:
        chosen = result["seeds"][0]["chosen"]["base_lr"]
        lines.append(f"  base_lr    {chosen:g}, the best of {len(result['tried'])} on the validation split")
    if scores["train/flops"]:
        lines.append(f"  training   {scores['time/train_s']:.0f} s, {flops(scores['train/flops'])} a seed")
    if result["unreadable"]:
        lines.append(f"  {result['unreadable']} images could not be read")
    lines.append(f"  {store.location}")
    if line := shown_record(RunFolder(store).path, resolve_tracking_uri(transfer.storage)):
        lines.append(f"  {line}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
