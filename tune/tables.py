"""The paper's ablations (He et al., arXiv 2111.06377, section 4 and figures 5, 7 and 9): rows, numbers, claims.

The paper's numbers are of ViT-L/16 on ImageNet-1K, 800 epochs: top-1 in percent, fine-tuned and by linear probing. Its
table 2 is in ``tune.timing``.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipelines.config import Config, flat
from pipelines.errors import UserError
from tune.space import with_values


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Args:
        label: As the paper has it.
        values: Those of the configuration, by dotted key; None where nothing here does it.
        finetune: The paper's top-1; None where it has none.
        linear: Likewise.
        flops: The paper's, over those of its default; None where it gives none.
        note: What of it is another than the paper's, or why nothing does it.
    """

    label: str
    values: Mapping[str, Any] | None
    finetune: float | None
    linear: float | None
    flops: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """What the paper says: some rows are better than others.

    Args:
        text: In words, of the paper's rows.
        pairs: Labels: the better row, the worse one. All must hold.
        margin: Points by which the better one may be behind: with 1, "the other gains less than a point".
    """

    text: str
    pairs: tuple[tuple[str, str], ...]
    margin: float = 0.0

    def among(self, labels: Collection[str]) -> "Claim":
        """What of the claim is about these rows alone; all of it where nothing is."""
        kept = tuple(pair for pair in self.pairs if set(pair) <= set(labels))
        return replace(self, pairs=kept, text=f"{self.text}, of these rows") if kept and kept != self.pairs else self


@dataclass(frozen=True)
class Table:
    """A table or figure.

    Args:
        title: What it is about.
        rows: Its rows for a configuration.
        claims: What the paper says of linear probing there.
        unjudged: What the paper says that no probe can decide; empty: nothing.
    """

    title: str
    rows: Callable[[Config], list[Row]]
    claims: tuple[Claim, ...]
    unjudged: str = ""


def _over(best: str, others: Iterable[str]) -> tuple[tuple[str, str], ...]:
    return tuple((best, other) for other in others if other != best)


def _depth(config: Config) -> list[Row]:
    # The paper's numbers are shares of its default, 8 blocks: of a recipe with 8 they are the paper's.
    paper = {1: (84.8, 65.5), 2: (84.9, 70.0), 4: (84.9, 71.9), 8: (84.9, 73.5), 12: (84.4, 73.3)}
    return _scaled(config, "model.decoder_depth", "blocks", paper, default=8, multiple=1)


def _width(config: Config) -> list[Row]:
    paper = {128: (84.9, 69.1), 256: (84.8, 71.3), 512: (84.9, 73.5), 768: (84.4, 73.1), 1024: (84.3, 73.1)}
    heads = config.model.decoder_heads
    multiple = next(n for n in range(heads, 5 * heads, heads) if n % 4 == 0)  # what the position table needs
    return _scaled(config, "model.decoder_width", "wide", paper, default=512, multiple=multiple)


def _scaled(
    config: Config, key: str, unit: str, paper: Mapping[int, tuple[float, float]], *, default: int, multiple: int
) -> list[Row]:
    """The paper's sizes as shares of its default; of several that come to one here, the default or first."""
    base, sizes = flat(config)[key], {default: flat(config)[key]}
    for size in paper:
        ours = max(multiple, multiple * round(size * base / default / multiple))
        if ours not in sizes.values():
            sizes[size] = ours
    rows = []
    for size, (finetune, linear) in paper.items():
        ours = sizes.get(size)
        values = None if ours is None else {key: ours}
        note = "no other size in this recipe" if ours is None else f"{ours} {unit}" if ours != size else ""
        rows.append(Row(str(size), values, finetune, linear, note=note))
    return rows


def _mask_token(config: Config) -> list[Row]:  # noqa: ARG001
    return [
        Row("with mask token", {"model.encoder_mask_tokens": True}, 84.2, 59.6, 3.3),
        Row("without mask token", {"model.encoder_mask_tokens": False}, 84.9, 73.5, 1.0),
    ]


def _shape(config: Config) -> Any:
    """The model without its memory."""
    import torch  # takes seconds, for which not every command waits

    from pipelines.training.build import build_model

    with torch.device("meta"):
        return build_model(config)


def _target(config: Config) -> list[Row]:
    model = _shape(config)
    components = max(1, model.channels * model.patch_size**2 // 8)  # 96 of 768, as the paper's
    return [
        Row("pixel (raw)", {"model.target": "raw"}, 84.9, 73.5),
        Row("pixel (normalised)", {"model.target": "normalized"}, 85.4, 73.9),
        Row(
            "PCA",
            {"model.target": "pca", "model.target_components": components},
            84.6,
            72.3,
            note=f"{components} components" if components != 96 else "",
        ),
        Row("dVAE token", None, 85.3, 71.6, note="needs a tokenizer, which is no option here"),
    ]


def _augmentation(config: Config) -> list[Row]:  # noqa: ARG001
    return [
        Row("none", {"data.augment": "none"}, 84.0, 65.7),
        Row("crop, fixed size", {"data.augment": "fixed_crop"}, 84.7, 73.1),
        Row("crop, random size", {"data.augment": "random_crop"}, 84.9, 73.5),
        Row("crop + colour jitter", {"data.augment": "random_crop_jitter"}, 84.3, 71.9),
    ]


def _masks(config: Config) -> list[Row]:  # noqa: ARG001
    def values(kind: str, ratio: float) -> dict[str, Any]:
        return {"model.mask": kind, "model.mask_ratio": ratio, "model.mask_cell": 1}

    return [
        Row("random 75 %", values("random", 0.75), 84.9, 73.5),
        Row("block 50 %", values("block", 0.5), 83.9, 72.3),
        Row("block 75 %", values("block", 0.75), 82.8, 63.9),
        Row("grid 75 %", values("grid", 0.75), 84.0, 66.0),
    ]


_RATIOS = {
    10: (83.2, 54.6), 20: (83.4, 58.9), 30: (83.4, 61.7), 40: (84.7, 67.0), 50: (84.9, 69.9),
    60: (85.0, 71.8), 70: (84.9, 73.2), 75: (84.9, 73.5), 80: (84.5, 71.8), 90: (83.0, 66.1),
}  # fmt: skip


def _mask_ratios(config: Config) -> list[Row]:  # noqa: ARG001
    return [Row(f"{ratio} %", {"model.mask_ratio": ratio / 100}, *paper) for ratio, paper in _RATIOS.items()]


def _schedule(config: Config) -> list[Row]:
    paper = {100: (82.3, 57.3), 200: (83.3, 64.4), 400: (84.3, 69.7), 800: (84.9, 73.5), 1600: (85.1, 75.1)}
    steps, rows = config.train.steps, []
    for epochs, (finetune, linear) in paper.items():
        # 800 epochs are the paper's default, as the recipe's length is here.
        values: dict[str, Any] = (
            {"train.steps": max(1, round(steps * epochs / 800))}
            if steps
            else {"train.epochs": config.train.epochs * epochs / 800}
        )
        key, ours = next(iter(values.items()))
        note = f"{ours:g} {key.split('.')[1]}" if values != {"train.epochs": epochs} else ""
        rows.append(Row(f"{epochs} epochs", values, finetune, linear, note=note))
    return rows


_BLOCKS = {"0": 73.5, "0.5": 79.1, "1": 81.0, "2": 83.1, "4": 84.2, "6": 84.4, "12": 84.6, "18": 84.7, "all": 84.9}


def encoder_depth(config: Config) -> int:
    """Blocks of a configuration's encoder."""
    return len(_shape(config).encoder.blocks)


def _partial(config: Config) -> list[Row]:
    depth = encoder_depth(config)
    swept = {"0", "0.5", "all", str(depth)} | {str(2**n) for n in range(depth.bit_length()) if 2**n < depth}
    labels = sorted(_BLOCKS.keys() | swept, key=lambda label: float(label) if label != "all" else depth + 100.0)
    rows = []
    for label in labels:
        note = f"{depth} blocks and the embedding" if label == "all" else ""
        note = note if label in swept else "not in the sweep of this encoder"
        # The encoder is the same in all rows: what differs is how it is tuned.
        rows.append(Row(label, {} if label in swept else None, _BLOCKS.get(label), None, note=note))
    return rows


TABLES: dict[str, Table] = {
    "1a": Table(
        "decoder depth",
        _depth,
        (
            Claim("a deep decoder helps linear probing: 8 blocks beat one", (("8", "1"),)),
            Claim("more is not needed: 12 blocks bring less than a point over 8", (("8", "12"),), 1.0),
        ),
        "with fine-tuning the depth matters little",
    ),
    "1b": Table(
        "decoder width",
        _width,
        (
            Claim("a width of 512 beats one of 128", (("512", "128"),)),
            Claim("wider is not needed: 768 and 1024 bring less than a point over 512",
                  _over("512", ("768", "1024")), 1.0),
        ),
        "with fine-tuning a narrow decoder does as well",
    ),
    "1c": Table(
        "mask token in the encoder",
        _mask_token,
        (Claim("mask tokens in the encoder hurt linear probing", (("without mask token", "with mask token"),)),),
        "with fine-tuning the difference is 0.7 points",
    ),
    "1d": Table(
        "reconstruction target",
        _target,
        (
            Claim("normalised pixels beat raw ones", (("pixel (normalised)", "pixel (raw)"),)),
            Claim("PCA does not help: raw pixels beat it", (("pixel (raw)", "PCA"),)),
        ),
        "tokens of a dVAE are not needed",
    ),
    "1e": Table(
        "data augmentation",
        _augmentation,
        (
            Claim("crops of random size are the best augmentation",
                  _over("crop, random size", ("none", "crop, fixed size", "crop + colour jitter"))),
            Claim("colour jitter is not needed: it brings less than a point over crops",
                  (("crop, random size", "crop + colour jitter"),), 1.0),
            Claim("it works without augmentation: less than 10 points are lost",
                  (("none", "crop, random size"),), 10.0),
        ),
    ),
    "1f": Table(
        "mask sampling",
        _masks,
        (
            Claim("random masks of 75 % beat blocks and the grid",
                  _over("random 75 %", ("block 50 %", "block 75 %", "grid 75 %"))),
            Claim("blocks do better at 50 % than at 75 %", (("block 50 %", "block 75 %"),)),
        ),
    ),
    "fig5": Table(
        "mask ratio",
        _mask_ratios,
        (
            Claim("a high ratio is better: 75 % beats 50 % and less",
                  _over("75 %", (f"{ratio} %" for ratio in _RATIOS if ratio <= 50))),
            Claim("linear probing peaks at 75 %", _over("75 %", (f"{ratio} %" for ratio in _RATIOS))),
        ),
        "fine-tuning is good over a broad range, 40 to 80 %",
    ),
    "fig7": Table(
        "training schedule",
        _schedule,
        (
            Claim("longer training helps, step by step",
                  (("400 epochs", "200 epochs"), ("800 epochs", "400 epochs"), ("1600 epochs", "800 epochs"))),
            Claim("no saturation: 1600 epochs beat 800", (("1600 epochs", "800 epochs"),)),
        ),
    ),
    "fig9": Table(
        "partial fine-tuning",
        _partial,
        (
            Claim("tuning the MLP of the last block beats tuning nothing", (("0.5", "0"),)),
            Claim("tuning one block beats tuning half of one", (("1", "0.5"),)),
            Claim("4 blocks come within a point of all", (("4", "all"),), 1.0),
        ),
    ),
}  # fmt: skip
"""By what ``--table`` calls them."""


def changes(config: Config, row: Row) -> dict[str, Any]:
    """What of a row differs from the recipe: nothing in the row that is the recipe itself, in whichever table."""
    now = flat(config)
    return {key: value for key, value in (row.values or {}).items() if now[key] != value}


def fitting(name: str, config: Config) -> list[Row]:
    """A table's rows for a recipe; one whose model cannot be built has no values, and its note says why."""
    found = []
    for row in TABLES[name].rows(config):
        try:
            with_values(config, changes(config, row))
            found.append(row)
        except UserError as error:
            found.append(Row(row.label, None, row.finetune, row.linear, row.flops, f"left out: {error}"))
    return found


def chosen(rows: Sequence[Row], labels: Sequence[str]) -> list[Row]:
    """Those of a table's rows that are asked for, in the table's order.

    Args:
        rows: All of the table.
        labels: What is asked for; empty: all.

    Raises:
        UserError: The table has no such row.
    """
    known = [row.label for row in rows]
    for label in labels:
        if label not in known:
            raise UserError(f"rows: the table has no row '{label}'; its rows are {', '.join(map(repr, known))}")
    return [row for row in rows if not labels or row.label in labels]
