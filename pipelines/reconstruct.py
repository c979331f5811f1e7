"""Looks into a pretrained model: reconstructions, attention, features and neighbours of chosen images, as pictures.

python -m pipelines.reconstruct --run digits
python -m pipelines.reconstruct --run digits --samples 3 17 --mask-ratios 0.5 0.9 --only reconstructions
python -m pipelines.reconstruct --weights mae_vit_base_full.pth --data shards/photos --heads
"""

import dataclasses
import io
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from PIL import Image
from pydantic import Field

from pipelines.cli import parse
from pipelines.commands import command_line
from pipelines.config import SEED_LIMIT, Data, Section, also
from pipelines.data.lookup import Samples, find_keys, key_of, read_samples
from pipelines.data.plan import Plan
from pipelines.data.readers import View
from pipelines.data.shards import Manifest, load_manifest
from pipelines.errors import UserError, run_command
from pipelines.runs import find_run, load_encoder, run_config
from pipelines.spool import Spool
from pipelines.storage import Store, absolute
from pipelines.tracking import RUN_FILE, send

if TYPE_CHECKING:
    import torch

    from pipelines.drawing import Subject

# PyTorch and timm are imported in functions: who mistypes a flag need not wait seconds for them.
PROG = command_line("pipelines.reconstruct")
MOST_ROWS = 100  # a picture of more is some 14,000 pixels high
_TITLE = 28
_NAMED = 5

Kind = Literal["reconstructions", "attention", "pca", "neighbours"]


class Reconstruct(Section):
    """Draws what a pretrained model makes of chosen images, or of some at random.

    Give --run NAME, or --weights FILE and --data SHARDS. The pictures go into the run's folder and its record in
    MLflow.
    """

    run: Annotated[str, also("--run.name")] = ""
    """The pretraining run to look into: its newest whole checkpoint."""
    storage: Annotated[str, also("--run.storage")] = "runs"
    """The folder or address that holds the runs."""
    weights: str = ""
    """Instead of a run: an MAE checkpoint (.pth, .safetensors), or an encoder alone, which cannot reconstruct."""
    data: Annotated[str, also("--data.train")] = ""
    """Shards that the images come from; empty: those that the run was trained on."""
    out: str = ""
    """Where the pictures go; empty: looking/ in the run's folder, or here for --weights."""
    only: tuple[Kind, ...] = ()
    """What to draw; empty: everything."""
    samples: tuple[int, ...] = ()
    """Sample ids, counted through all shards from 0."""
    keys: tuple[str, ...] = ()
    """Keys of samples, as the shards name them."""
    num: int = Field(default=8, ge=1, le=MOST_ROWS)
    """Images drawn at random where none are named."""
    seed: int = Field(default=0, ge=0, lt=SEED_LIMIT)
    """Which ones; the run's own seed gives the images of its pictures while training."""
    mask_ratios: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field((0.75,), min_length=1)
    """Shares of the patches that are hidden: a picture for each, and for each mask seed."""
    mask_seeds: tuple[Annotated[int, Field(ge=0, lt=SEED_LIMIT)], ...] = Field((0,), min_length=1)
    """Which patches are hidden; the run's own seed gives the masks of its first epoch."""
    heads: bool = False
    """Draw the attention of each head, beside their mean."""
    neighbours: int = Field(default=8, ge=1, le=32)
    """Neighbours of an image."""
    neighbours_of: int = Field(default=2000, ge=2)
    """Images, spread over the data, that neighbours are looked for among."""
    mean: tuple[float, ...] = Data().mean
    """With --weights: mean of each channel, of values in 0..1."""
    std: tuple[float, ...] = Data().std
    """With --weights: standard deviation of each channel."""
    target: Literal["raw", "normalized"] = "normalized"
    """With --weights: what its decoder predicts, pixels or pixels normalised within each patch."""
    num_heads: int = Field(default=0, ge=0)
    """With --weights: encoder heads; 0: as the file says, else by the width."""
    decoder_num_heads: int = Field(default=0, ge=0)
    """With --weights: decoder heads; 0: as the file says, else 16."""


_OF_WEIGHTS = ("mean", "std", "target", "num_heads", "decoder_num_heads")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Raises:
        UserError: There is no such run, file, data or sample, or nothing to draw.
    """
    args = parse(Reconstruct, prog=PROG, argv=argv)
    if bool(args.run) == bool(args.weights):
        given = "both are given" if args.run else "neither is given"
        raise UserError(f"name what to look into by --run NAME or by --weights FILE: {given} (see {PROG} --help)")
    named = load_manifest(args.data) if args.data else None
    subject, folder, data = _of_run(args) if args.run else _of_weights(args)
    kinds = _kinds(args, subject)
    manifest = named or load_manifest(data)
    chosen = _choose(args, manifest)
    read = _read(manifest, chosen, subject.view)
    print(f"{subject.title}: {len(read.sample_B)} of {manifest.num_samples:,} images of {data}", flush=True)

    default = folder.path("looking") if folder else "looking"
    out = Store(absolute(args.out or default))
    names = []
    for name, picture in _draw(args, kinds, subject, manifest, read):
        png = io.BytesIO()
        picture.save(png, "png")
        out.write(name, png.getvalue())
        names.append(name)
        print(f"wrote {out.shown(name)}", flush=True)
    if folder:
        _record(args.run, folder, out, names)
    return 0


def _of_run(args: Reconstruct) -> "tuple[Subject, Store, str]":
    """The model of a run, the run's folder, and the data to look at."""
    for name in _OF_WEIGHTS:
        if getattr(args, name) != Reconstruct.model_fields[name].default:
            raise UserError(f"--{name.replace('_', '-')} goes with --weights: a run has its own")
    folder = find_run(args.storage, args.run)
    config = run_config(folder)

    from pipelines.drawing import Subject

    model, step = load_encoder(folder, config, _warn)
    view = View(config.data.image_size, config.data.channels, crop_share=config.probe.crop_share)
    title = f"{args.run}, step {step}"
    subject = Subject(model.to(_device()), title, config.data.mean, config.data.std, view, config.probe.pool)
    return subject, folder, args.data or config.data.train


def _of_weights(args: Reconstruct) -> "tuple[Subject, None, str]":
    """The model of a file, no run's folder, and the data to look at."""
    path = Path(args.weights).expanduser()
    if not args.data:
        raise UserError("--weights needs images to look at: name shards with --data DIR")
    if not path.is_file():
        raise UserError(f"--weights: no file '{path}'")

    from mae_core.weights import load_weights
    from pipelines.drawing import Subject

    try:
        model, has_decoder = load_weights(
            path,
            num_heads=args.num_heads or None,
            decoder_num_heads=args.decoder_num_heads or None,
            target=args.target,
        )
    except ValueError as error:
        raise UserError(f"--weights: {error}") from None
    channels = model.channels
    if channels not in (1, 3):
        raise UserError(f"--weights: {path} takes images of {channels} channels; 1 (grey) or 3 (RGB) are read here")
    if len(args.mean) != channels or len(args.std) != channels or min(args.std) <= 0:
        raise UserError(
            f"--mean and --std need a value for each of the {channels} channels of {path}, those of --std above 0; "
            f"found {args.mean} and {args.std}"
        )
    view = View(model.image_size, channels)
    model = model.eval().to(_device())
    return Subject(model, path.name, args.mean, args.std, view, has_decoder=has_decoder), None, args.data


def _kinds(args: Reconstruct, subject: "Subject") -> list[str]:
    """What is to be drawn, of what this model can."""
    kinds = [kind for kind in get_args(Kind) if kind in args.only or not args.only]
    if "reconstructions" in kinds:
        if subject.has_decoder:
            for ratio in args.mask_ratios:
                try:
                    dataclasses.replace(subject.model.masking, mask_ratio=ratio)
                except ValueError as error:
                    raise UserError(f"--mask-ratios: {error}") from None
        else:
            reason = f"{subject.title} has no decoder, so nothing can be reconstructed"
            if args.only:
                raise UserError(f"--only reconstructions: {reason}; give a full checkpoint")
            _warn(f"{reason}; the other pictures are drawn")
            kinds.remove("reconstructions")
    return kinds


def _choose(args: Reconstruct, manifest: Manifest) -> list[int]:
    """The ids of the samples to look at, in the order of the rows."""
    for sample in args.samples:
        if not 0 <= sample < manifest.num_samples:
            raise UserError(
                f"--samples: there is no sample {sample}: the {manifest.num_samples:,} of {manifest.location} are "
                f"numbered from 0 to {manifest.num_samples - 1}"
            )
    named = list(dict.fromkeys((*args.samples, *find_keys(manifest, args.keys))))
    if len(named) > MOST_ROWS:
        raise UserError(f"{len(named)} samples are named: a picture has at most {MOST_ROWS} rows")
    return named or _spread(manifest, args.num, args.seed)


def _spread(manifest: Manifest, num: int, seed: int) -> list[int]:
    """Ids of some samples, each once, in a random order."""
    num = min(num, manifest.num_samples)
    return Plan(manifest.num_samples, seed).samples(0, num)[0].tolist()


def _read(manifest: Manifest, chosen: list[int], view: View) -> Samples:
    (read,) = read_samples(manifest, chosen, view, rows=MOST_ROWS)
    for line in read.skipped:
        _warn(f"{line['key']} in {line['shard']} cannot be read ({line['reason']}) and is left out")
    if not len(read.sample_B):
        raise UserError(f"none of the {len(chosen)} chosen images can be read")
    return read


def _draw(
    args: Reconstruct, kinds: list[str], subject: "Subject", manifest: Manifest, read: Samples
) -> Iterator[tuple[str, Image.Image]]:
    """The pictures, each with its file's name."""
    from pipelines.drawing import draw_attention, draw_neighbours, draw_pca, draw_reconstruction, find_neighbours

    images_BHWC, sample_B = read.images_BHWC, read.sample_B
    titles = [f"{id_} {key_of(manifest, id_)}" for id_ in sample_B.tolist()]
    print("rows: " + ", ".join(titles), flush=True)
    titles = [title if len(title) <= _TITLE else f"{title[: _TITLE - 3]}..." for title in titles]
    try:
        if "reconstructions" in kinds:
            for ratio in dict.fromkeys(args.mask_ratios):
                for seed in dict.fromkeys(args.mask_seeds):
                    picture = draw_reconstruction(subject, images_BHWC, sample_B, mask_ratio=ratio, mask_seed=seed)
                    yield f"reconstruction-ratio-{ratio:g}-seed-{seed}.png", picture
        if "attention" in kinds:
            yield "attention.png", draw_attention(subject, images_BHWC, titles, heads=args.heads)
        if "pca" in kinds:
            yield "pca.png", draw_pca(subject, images_BHWC, titles)
        if "neighbours" in kinds:
            base = sorted(_spread(manifest, args.neighbours_of, args.seed))
            id_BK, similarity_BK, skipped = find_neighbours(
                subject, images_BHWC, sample_B, manifest, base, args.neighbours
            )
            if skipped:
                named = ", ".join(line["key"] for line in skipped[:_NAMED]) + (", ..." if len(skipped) > _NAMED else "")
                _warn(f"{len(skipped)} of the {len(base):,} images that neighbours are among cannot be read: {named}")
            yield "neighbours.png", draw_neighbours(subject, images_BHWC, manifest, id_BK, similarity_BK)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{subject.title}: {error}") from None


def _record(run: str, folder: Store, out: Store, names: list[str]) -> None:
    """Sends the pictures to the run's record in MLflow.

    Through a spool of their own, beside the pictures and gone when all is sent: the run's has one writer, which may be
    training just now.
    """
    if not folder.exists(RUN_FILE):
        print(f"run '{run}' has no {RUN_FILE}, so nothing goes to MLflow")
        return
    waiting = f"unsent-{run}"
    beside = out.local() if out.is_local else Path(tempfile.mkdtemp(prefix="mae-looking-"))
    local = beside / waiting
    local.mkdir(parents=True, exist_ok=True)
    (local / RUN_FILE).write_bytes(folder.read(RUN_FILE))
    spool = Spool(local)
    for name in names:
        if not out.is_local:
            (beside / name).write_bytes(out.read(name))
        spool.artifact(f"../{name}", "looking")
    spool.close()
    sent = send(local, timeout_s=30.0)
    if sent.left:
        _warn(
            f"{sent.left} pictures are not in MLflow yet ({sent.problem or 'no answer'}): send them later with "
            f"{command_line('pipelines.sync', waiting, storage=str(beside))}"
        )
    else:
        print(f"sent {sent.files} pictures to the run's artifacts in MLflow, folder looking/")
        shutil.rmtree(local if out.is_local else beside)


def _device() -> "torch.device":
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
