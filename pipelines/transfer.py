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
from collections.abc import Callable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mae_core.names import printable
from pipelines.amounts import flops
from pipelines.cli import parse_with_file, to_toml
from pipelines.commands import command_line
from pipelines.config import Config
from pipelines.data.index import WRITE_HINT
from pipelines.data.shards import Manifest, load_index, load_manifest, need_labels, need_same_classes
from pipelines.early import check_gpus
from pipelines.errors import FAILED, USAGE_ERROR, UserError, run_command
from pipelines.kinds import WEIGHTS, refuse_other
from pipelines.lease import Lease, hold
from pipelines.runs import final_step, find_run, finished_when
from pipelines.spool import Spool, Status
from pipelines.storage import Store, recordable
from pipelines.tracking import create_run, resolve_tracking_uri, send, shown_record
from pipelines.training.runfolder import RunFolder
from pipelines.transfer_config import (
    CACHED,
    Protocol,
    Transfer,
    TransferData,
    TransferTrain,
    metric,
    recipe,
    schedule,
    units,
    with_random,
)
from pipelines.transfer_identity import as_pretrained, dataset_name, identity, score_name, source_name

if TYPE_CHECKING:
    import torch

    from pipelines.stopping import Signals

# PyTorch, timm and Ray are imported in functions: who mistypes a flag need not wait seconds for them.
PROG = command_line("pipelines.transfer")
_PROTOCOLS: tuple[str, ...] = Protocol.__args__  # type: ignore[attr-defined]


class TransferFailedError(RuntimeError):
    """A transfer failed by what is no mistake of the user's.

    Args:
        code: What the command exits with.
    """

    def __init__(self, text: str, code: int):
        super().__init__(text)
        self.code = code


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
    values["storage"] = recordable(transfer.storage, "storage")
    for key in ("train", "test", "val"):
        if values["data"][key]:
            values["data"][key] = recordable(values["data"][key], f"data.{key}")
    if transfer.weights:
        values["weights"] = recordable(transfer.weights, "weights")
    return Transfer.model_validate(values)


def check_labels(data: Mapping[str, Manifest]) -> None:
    """Sees that the classes of what is scored on are known to the training images, and that there are several.

    Args:
        data: ``train``, ``test`` and, where there is one, ``val``.

    Raises:
        UserError: They are not, or there are no labels, or those of one class alone.
    """
    for name, manifest in data.items():
        need_labels(f"data.{name}", manifest, "a transfer")
    _check_split(data)
    for name, manifest in data.items():
        need_same_classes("data.train", data["train"], f"data.{name}", manifest)

    from pipelines.training.scores import check_classes

    for name, manifest in data.items():
        check_classes(f"data.{name}", manifest)


def check_masks(transfer: Transfer, data: Mapping[str, Manifest]) -> int:
    """Sees that there are masks to learn from and to score on; returns how many classes they have.

    Raises:
        UserError: There are none, or it is not known how many classes they have, or there are more, or only one.
    """
    for name, manifest in data.items():
        if not any(load_index(manifest, shard).mask_size_S.any() for shard in range(len(manifest.shard_names))):
            raise UserError(
                f"data.{name}: the shards in {manifest.location} have no masks: pack with make_shards --masks, or "
                f"where the tars hold .mask.png members, {WRITE_HINT}"
            )
    _check_split(data)
    num_classes = transfer.data.num_classes or len(transfer.data.class_names) or data["train"].mask_classes
    if not num_classes:
        raise UserError(
            "data.train: its manifest does not say how many classes the masks have: give --data.num-classes"
        )
    for name, manifest in data.items():
        if manifest.mask_classes > num_classes:
            raise UserError(
                f"data.{name}: the masks have {manifest.mask_classes} classes, and {num_classes} are learned: "
                f"give --data.num-classes {manifest.mask_classes}"
            )
        # 0 where nobody has read them: what is scored is looked at again when it has been.
        if min(num_classes, manifest.mask_classes or num_classes) < 2:
            raise UserError(
                f"data.{name}: the masks make one class, 0, and whoever always says 0 gets 100 % mIoU; in masks of 0 "
                "and 255 the 255 does not count: write 1 where the thing is, and pack again"
            )
    names = transfer.data.class_names
    if names and len(names) != num_classes:
        raise UserError(f"data.class_names: {len(names)} names for {num_classes} classes: give one for each, from 0 on")
    return num_classes


def _check_split(data: Mapping[str, Manifest]) -> None:
    num = data["train"].num_samples
    if "val" not in data and num < 2:
        raise UserError(f"data.train: {num} images cannot be split into learning and validation")


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
    apart = Store(transfer.storage).child(f"{WEIGHTS}{source_name(transfer)}")
    # What is known at once is said at once.
    if transfer.weights:
        refuse_other(apart, "weights")
    else:
        find_run(transfer.storage, transfer.run)
    check_gpus(transfer.scale)
    places = {"train": transfer.data.train, "test": transfer.data.test, "val": transfer.data.val}
    data = {name: load_manifest(place) for name, place in places.items() if place}
    if transfer.protocol == "segment":
        num_classes = check_masks(transfer, data)
        classes = transfer.data.class_names or tuple(map(str, range(num_classes)))
    else:
        check_labels(data)
        classes = data["train"].classes

    from pipelines.ray_session import connect
    from pipelines.stopping import StoppedError, take_signals
    from pipelines.training.launch import check_resources
    from pipelines.transfer_record import finish, note_on_parent, read_result
    from pipelines.transfer_source import normalised, source

    parent, config, state, step, weights_digest = source(transfer)
    transfer = as_pretrained(transfer, config)
    config = normalised(transfer, config)
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    asked = units(transfer, depth)
    for unit in asked:
        check_classifier(unit, config, len(classes))
    above = parent or apart
    digests: dict[str, Any] = {name: manifest.digest for name, manifest in data.items()}
    if transfer.protocol == "segment":
        digests["num_classes"] = len(classes)
    if transfer.weights:
        digests["weights"] = weights_digest
    scored: list[tuple[Transfer, dict[str, Any]]] = []
    with contextlib.ExitStack() as stack:
        signals: Signals | None = None
        for unit in asked:
            began = time.perf_counter()
            values = identity(unit, step, digests)
            digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
            store = above.child("transfer").child(f"{dataset_name(unit)}-{score_name(unit)}-{digest}")
            result, seconds = read_result(store, unit), None
            if result:
                print(f"{score_name(unit)} has finished already{finished_when(store)}; nothing to do")
            else:
                if _lacks(store, unit):
                    if signals is None:
                        stack.enter_context(connect(address=transfer.scale.address))
                        signals = stack.enter_context(take_signals())
                    scale = check_resources(transfer.scale, transfer.data.cpus_per_task)
                    try:
                        if signals.number:
                            raise StoppedError("stopped before it began", signals.number, is_recorded=True)
                        with hold(store, f"the transfer {score_name(unit)}", "transfer") as lease:
                            fitted = unit.model_copy(update={"scale": scale})
                            _run(fitted, config, state, data, classes, parent, store, values, lease, signals)
                    except TransferFailedError as failed:
                        print(f"error: {score_name(unit)} failed: {failed}", file=sys.stderr)
                        return failed.code
                    except StoppedError as stopped:
                        print(f"{score_name(unit)} {stopped}; the same command continues it", file=sys.stderr)
                        return stopped.code
                result, seconds = finish(unit, store, classes), time.perf_counter() - began
            print(told(unit, result, store, seconds), flush=True)
            if parent is not None:
                note_on_parent(parent, store)
            scored.append((unit, result))
    if len(asked) > 1:
        print(f"\nplot       {printable(plot(transfer, parent, above, scored))}")
    return 0


def _lacks(store: Store, unit: Transfer) -> bool:
    """Whether something that a transfer is asked for has no score yet."""
    from pipelines.training.scores import read_random, read_scored

    lacks_random = with_random(unit) and read_random(store) is None
    return lacks_random or any(read_scored(store, seed) is None for seed in unit.seeds)


def told_at_start(unit: Transfer, data: Mapping[str, Manifest], num_classes: int) -> list[str]:
    """What a transfer is about to do: on how many images, for how many steps, and what of that cannot be as asked."""
    from pipelines.training.transfer_worker import share_of, split

    learn, val = split(unit, data["train"].num_samples)
    num, fraction = share_of(unit, len(learn)), unit.data.label_fraction[0]
    share = f" ({100 * fraction:g} % of {len(learn):,})" if fraction < 1 else ""
    num_val = data["val"].num_samples if "val" in data else len(val)
    name = score_name(unit)
    lines = [
        f"{name}: {num:,} images to learn from{share}, {num_val:,} to choose on, "
        f"{data['test'].num_samples:,} to test on, {num_classes} classes"
    ]
    if unit.protocol in CACHED:
        return lines
    planned = schedule(unit.train, num)
    lines.append(
        f"{name}: {planned.steps:,} steps of {planned.global_size:,} images ({unit.train.epochs:g} epochs), "
        f"{planned.warmup_steps:,} of them warm-up, for each seed"
    )
    if planned.warmup_steps < planned.asked_warmup:
        epochs = planned.warmup_steps * planned.global_size / num
        lines.append(
            f"warning: --train.warmup-epochs {unit.train.warmup_epochs:g} would be {planned.asked_warmup:,} of the "
            f"{planned.steps:,} steps, and the rate would hardly fall again: it is cut to half of them; give "
            f"--train.epochs {2 * unit.train.warmup_epochs:g} or more, or --train.warmup-epochs {epochs:.3g}"
        )
    if unit.train.global_size > num:
        lines.append(f"a step takes all {num:,} images: --train.global-size {unit.train.global_size:,} are more")
    return lines


def plot(transfer: Transfer, parent: Store | None, above: Store, scored: list[tuple[Transfer, dict[str, Any]]]) -> str:
    """Draws the scores over what was varied, for the pretraining run's record too; returns the picture's path."""
    from pipelines.plots import Point, draw_scores

    varied: dict[str, Callable[[Transfer], float]] = {
        "blocks": lambda unit: inf if unit.protocol in ("finetune", "scratch") else unit.blocks[0],
        "labels": lambda unit: unit.data.label_fraction[0],
        "visible": lambda unit: unit.visible[0],
    }
    titles = {
        "blocks": "blocks that train", "labels": "share of the labels", "visible": "share of visible patches",
        "weights": "weights at the start",
    }  # fmt: skip
    found = [name for name, of in varied.items() if len({of(unit) for unit, _ in scored}) > 1]
    # Of several the one with the most values goes across, and the others make lines.
    found.sort(key=lambda name: -len({varied[name](unit) for unit, _ in scored}))
    name = found[0] if found else "weights"
    lines: dict[str, list[Point]] = {}
    scored_by = metric(transfer)
    for unit, result in scored:
        scores, is_scratch = result["scores"], unit.protocol == "scratch"
        line = "from scratch" if is_scratch and found else transfer.protocol
        line += "".join(f", {titles[other]} {_number(varied[other](unit))}" for other in found[1:])
        x = varied[name](unit) if found else float(not is_scratch)
        label = _number(x) if found else ("random" if is_scratch else "pretrained")
        half = scores[f"test/{scored_by}_interval"]
        point = Point(x, label, scores[f"test/{scored_by}"], half,
                      scores["time/train_s"] if scores["train/flops"] else 0.0, scores["train/flops"])  # fmt: skip
        lines.setdefault(line, []).append(point)
    title = f"{source_name(transfer)} on {dataset_name(transfer)}"
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


def _number(value: float) -> str:
    return "all" if value == inf else f"{value:g}"


def _run(
    transfer: Transfer,
    config: Config,
    state: "dict[str, torch.Tensor]",
    data: Mapping[str, Manifest],
    classes: tuple[str, ...],
    parent: Store | None,
    store: Store,
    values: dict[str, Any],
    lease: Lease,
    signals: "Signals",
) -> None:
    """Learns and scores with the seeds that have no score yet.

    Raises:
        UserError: It failed by what the user can mend.
        TransferFailedError: It failed otherwise.
        StoppedError: A signal came.
    """
    import ray
    import ray.train

    from pipelines.console import Printer, make_console
    from pipelines.stopping import REACH_A_STEP_S, StoppedError, do_until_stopped
    from pipelines.training.launch import run_workers
    from pipelines.training.transfer import transfer_worker
    from pipelines.training.transfer_worker import TransferJob
    from pipelines.transfer_record import describe

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
    job = TransferJob(
        transfer, config, ray.put(state), data["train"], data["test"], data.get("val"), classes, store, console, lease
    )
    for line in told_at_start(transfer, data, len(classes)):
        print(line, flush=True)

    def work() -> None:
        error = ""
        try:
            run_workers(lambda: transfer_worker(job), transfer.scale, store)
        except ray.train.TrainingFailedError as failed:
            error = str(failed).strip().splitlines()[-1]
        failure = ray.get(console.failure.remote())
        if failure or error:
            lease.check()
            _end_record(store, "FAILED")
            if failure and failure[1] == USAGE_ERROR:
                raise UserError(failure[0])
            text, code = failure or (error, FAILED)
            raise TransferFailedError(text, code)

    # What computes features once has no steps, and nothing to keep.
    patience_s = 0.0 if transfer.protocol in CACHED else REACH_A_STEP_S
    try:
        do_until_stopped(work, console, signals, what="the transfer", patience_s=patience_s)
    except StoppedError as stopped:
        if not stopped.is_recorded:
            _end_record(store, "KILLED")
        raise
    finally:
        printer.stop()


def _end_record(store: Store, status: Status) -> None:
    """Writes how a transfer ended where its workers could not, and sends the record."""
    with contextlib.suppress(OSError):
        folder = RunFolder(store)
        Spool(folder.path).status(status)
        send(folder.path, timeout_s=10.0)
        folder.push()


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
    whose = printable(source_name(transfer))
    unit, score = " mIoU" if name == "miou" else "", scores[f"test/{name}"]
    lines = [
        "",
        f"{score_name(transfer)} of {whose} on {dataset_name(transfer)}{took}",
        f"  validation {scores[f'val/{name}']:.2f} %{unit}",
        f"  test       {score:.2f} %{spread}; read at the end, nothing is chosen there",
    ]
    random = scores.get(f"test/random_{name}")
    if random is not None:
        lines.append(f"  random     {random:.2f} % from a random encoder, with the first seed")
        if score <= random:
            lines.append("  the pretrained encoder is no better than the random one")
    elif transfer.protocol in ("partial", "finetune"):
        lines.append("  random     not trained here: --protocol scratch, or finetune with --against-scratch, says it")
    if result.get("at_chance"):
        lines.append(
            f"  AT CHANCE: always naming one class gives {result['chance']:.2f} %{unit}. Nothing was learned that "
            "shows: look at steps and learning rate above"
        )
    if skipped := result.get("skipped_steps"):
        lines.append(f"  {skipped} steps were skipped, as their loss or a gradient was not finite")
    if result["tried"]:
        chosen = result["seeds"][0]["chosen"]["base_lr"]
        lost = sum(one["validation"] is None for one in result["tried"])
        lines.append(
            f"  base_lr    {chosen:g}, the best of {len(result['tried'])} on the validation split"
            f"{f'; {lost} did not stay finite' if lost else ''}"
        )
    if scores["train/flops"]:
        lines.append(f"  training   {scores['time/train_s']:.0f} s, {flops(scores['train/flops'])} a seed")
    if result["unreadable"]:
        lines.append(f"  {result['unreadable']} images could not be read")
    lines.append(f"  {printable(store.location)}")
    if line := shown_record(RunFolder(store).path, resolve_tracking_uri(transfer.storage)):
        lines.append(f"  {line}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
