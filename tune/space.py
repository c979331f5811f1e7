"""What a search varies: a TOML file of dotted configuration keys, each with its values or its range.

    ["model.mask_ratio"]
    low = 0.3
    high = 0.9
    step = 0.05          # a lattice; without it, any number between
    ["model.decoder_width"]
    values = [32, 64, 128, 256]
    ["optim.base_lr"]
    low = 1e-4
    high = 1e-2
    log = true

A space is checked against the configuration that it varies, before anything runs.
"""

import difflib
import itertools
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydantic

from pipelines.cli import flag_names, reason
from pipelines.config import Config, defines_result, flat, identity_hash
from pipelines.errors import UserError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_FIELDS = ("values", "low", "high", "step", "log")
_SEED = "run.seed"


@dataclass(frozen=True)
class Axis:
    """One key that is varied: over values, or over a range.

    Args:
        key: Its dotted name.
        values: In rising order; () for a range.
        low: First point of a range; an int where the key holds whole numbers.
        high: Last point of a range.
        step: Distance of neighbours in a range; None: any number between.
        log: Whether a range is even in its logarithm.
    """

    key: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False

    @property
    def size(self) -> int | None:
        """How many points it has; None where they cannot be counted."""
        if self.values:
            return len(self.values)
        if self.step is not None:
            return 1 + round((self.high - self.low) / self.step)
        return int(self.high - self.low) + 1 if self._whole else None

    def grid(self, points_per_range: int) -> tuple[Any, ...]:
        """All its values, or all points of its lattice; of a range without a step, so many, its ends among them."""
        if self.values:
            return self.values
        if self.step is not None:
            return tuple(self._lattice(place) for place in range(self.size or 0))
        spaced = (np.geomspace if self.log else np.linspace)(self.low, self.high, points_per_range)[1:-1]
        # Six digits: enough to tell them apart, and 0.6 instead of 0.6000000000000001.
        between = [round(x) if self._whole else float(f"{x:.6g}") for x in spaced]
        return tuple(dict.fromkeys((self.low, *between, self.high)))

    def draw(self, rng: np.random.Generator) -> Any:
        """A point, all equally likely; in a range with log, all of its decades."""
        if self.values:
            return self.values[rng.integers(len(self.values))]
        if self.step is not None:
            return self._lattice(int(rng.integers(self.size or 0)))
        if self.log:
            half = 0.5 if self._whole else 0.0
            drawn = math.exp(rng.uniform(math.log(self.low - half), math.log(self.high + half)))
            return min(max(round(drawn) if self._whole else drawn, self.low), self.high)
        if self._whole:
            return int(rng.integers(int(self.low), int(self.high) + 1))
        return float(rng.uniform(self.low, self.high))

    def snapped(self, value: Any) -> Any:
        """The point of a lattice that a rounded number stands for; others as they are."""
        return value if self.step is None else self._lattice(round((value - self.low) / self.step))

    def optuna(self) -> "BaseDistribution":
        """Optuna's name for it."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.values:
            return CategoricalDistribution(self.values)
        if self._whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    @property
    def _whole(self) -> bool:
        return isinstance(self.low, int)

    def _lattice(self, place: int) -> float:
        # In decimals, as they were written: 0.3 + 2 * 0.05 is 0.4, the same number as in a recipe.
        point = Decimal(str(self.low)) + place * Decimal(str(self.step))
        return int(point) if self._whole else float(point)


@dataclass(frozen=True)
class Space:
    """What is varied together. Its points do not depend on the order of its axes, nor of their values."""

    axes: tuple[Axis, ...]

    @property
    def digest(self) -> str:
        """A short name: the same digest, the same points."""
        return identity_hash({axis.key: asdict(axis) for axis in self.axes})

    @property
    def size(self) -> int | None:
        """How many points it has; None where they cannot be counted."""
        sizes = [axis.size for axis in self.axes]
        return None if None in sizes else math.prod(size for size in sizes if size is not None)

    def grid(self, points_per_range: int = 5) -> list[dict[str, Any]]:
        """Every combination of values; ranges without a step are cut into points.

        Args:
            points_per_range: How many, 2 or more, the range's ends among them.
        """
        points = itertools.product(*(axis.grid(points_per_range) for axis in self._ordered()))
        return [self._named(point) for point in points]

    def random(self, num: int, seed: int) -> list[dict[str, Any]]:
        """Distinct points: the same for the same seed, and the first ones the same for any number.

        Args:
            num: How many; of a space that has no more, all.
            seed: Of a generator of their own.
        """
        rng, axes = np.random.default_rng(seed), self._ordered()
        num = num if self.size is None else min(num, self.size)
        found: dict[tuple[Any, ...], None] = {}
        while len(found) < num:
            found[tuple(axis.draw(rng) for axis in axes)] = None
        return [self._named(point) for point in found]

    def optuna(self) -> "dict[str, BaseDistribution]":
        """The space for an Optuna sampler, whose suggestions go through ``snapped``."""
        return {axis.key: axis.optuna() for axis in self.axes}

    def snapped(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A sampler's suggestion as a point of this space: Optuna says 0.6000000000000001 for 0.6 of a lattice."""
        return {axis.key: axis.snapped(values[axis.key]) for axis in self.axes}

    def _ordered(self) -> list[Axis]:
        return sorted(self.axes, key=lambda axis: axis.key)

    def _named(self, point: Iterable[Any]) -> dict[str, Any]:
        values = dict(zip((axis.key for axis in self._ordered()), point, strict=True))
        return {axis.key: values[axis.key] for axis in self.axes}


def load_space(path: str, config: Config) -> Space:
    """Reads what a search varies.

    Args:
        path: A TOML file with a table for each key.
        config: The configuration whose values are replaced.

    Raises:
        UserError: No such file, no TOML, a key that does not exist or may not vary, or an axis that makes no sense.
    """
    try:
        with Path(path).open("rb") as file:
            tables = tomllib.load(file)
    except FileNotFoundError:
        raise UserError(f"no space file '{path}'") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file: {error}") from None
    if not tables:
        raise UserError(f'{path}: nothing varies: give at least one table, such as ["model.mask_ratio"]')
    try:
        return Space(tuple(_axis(key, table, config) for key, table in tables.items()))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """A configuration with other values under some dotted keys.

    Raises:
        UserError: The schema refuses one, or the model that they describe cannot be built.
    """
    from pipelines.training.build import check_model  # imports PyTorch, for which not every command waits

    changed = _validated(config, values)
    try:
        check_model(changed)
    except UserError as error:
        raise UserError(f"{_shown(values)}: {str(error).removeprefix('model: ')}") from None
    return changed


def encoder_part(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a point's values that an untrained encoder's score depends on: not the decoder's, nor the training's."""
    others = ("model.decoder", "model.mask", "model.target", "model.loss_on")
    looks = ("data.channels", "train.precision")
    return {
        key: value
        for key, value in values.items()
        if key in looks or (key.startswith("model.") and not key.startswith(others))
    }


def check_points(config: Config, points: Iterable[Mapping[str, Any]]) -> None:
    """Finds what cannot be built before a trial does: builds each point's model without its memory.

    Raises:
        UserError: Of the first point that does not fit.
    """
    built: set[str] = set()
    for values in points:
        changed = _validated(config, values)
        shape = changed.model.model_dump_json() + changed.data.model_dump_json()
        if shape not in built:
            with_values(config, values)
            built.add(shape)


def _validated(config: Config, values: Mapping[str, Any]) -> Config:
    changed = config.model_dump()
    for key, value in values.items():
        section, _, name = key.partition(".")
        changed[section][name] = value
    try:
        return Config.model_validate(changed)
    except pydantic.ValidationError as error:
        # What two keys do not do together is told without a value's name.
        where = "" if error.errors()[0]["loc"] else f"{_shown(values)}: "
        raise UserError(where + reason(error)) from None


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _check_key(key: str, table: Any, config: Config) -> None:
    known = list(flag_names(Config))
    if key in Config.model_fields and isinstance(table, dict):
        raise UserError(f'[{key}...]: put the key in quotes, such as ["{key}.{next(iter(table), "...")}"]')
    if key not in known:
        near = difflib.get_close_matches(key, known, n=3)
        raise UserError(f"{key}: no such key{'; did you mean ' + ' or '.join(near) + '?' if near else ''}")
    if key == _SEED:
        raise UserError(f"{key} may not vary in a space: several seeds are asked for with --seeds")
    if key.startswith("run.") or not defines_result(key):
        raise UserError(
            f"{key} may not vary: a search varies what defines a result, of data, model, batch, optim, train"
        )
    if key == "train.epochs" and config.train.steps:
        raise UserError(f"{key} has no effect: the configuration gives train.steps, {config.train.steps}")
    if isinstance(flat(config)[key], tuple):
        raise UserError(f"{key} may not vary: it is a list, and an axis has single values")


def _axis(key: str, table: Any, config: Config) -> Axis:
    """An axis of a space's file, its points as the schema has them (64.0 of a width is 64)."""
    _check_key(key, table, config)
    if not isinstance(table, dict):
        raise UserError(f'{key}: expected a table ["{key}"], found {table!r}')
    for name in table:
        if name not in _FIELDS:
            raise UserError(f"{key}: no field '{name}': an axis has values, or low, high, step and log")
    if "values" in table:
        return _values_axis(key, table, config)
    if not {"low", "high"} <= table.keys():
        raise UserError(f"{key}: give values, or low and high")
    return _range_axis(key, table, config)


def _values_axis(key: str, table: dict[str, Any], config: Config) -> Axis:
    if len(table) > 1:
        raise UserError(f"{key}: values and {next(name for name in table if name != 'values')} exclude each other")
    given = table["values"]
    if not isinstance(given, list) or any(isinstance(value, list | dict) for value in given):
        raise UserError(f"{key}: values must be a list of single values, found {given!r}")
    values = [_point(key, value, config) for value in given]
    if twice := [value for value in values if values.count(value) > 1]:
        raise UserError(f"{key}: values has {twice[0]!r} twice")
    if len(values) < 2:
        raise UserError(f"{key}: values has {len(values)} of them: an axis needs two or more")
    return Axis(key, tuple(sorted(values)))


def _range_axis(key: str, table: dict[str, Any], config: Config) -> Axis:
    now = flat(config)[key]
    if isinstance(now, bool) or not isinstance(now, int | float):
        raise UserError(f"{key} has no range, it is {now!r}: give values")
    for name in ("low", "high", "step"):
        number = table.get(name, 1)
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise UserError(f"{key}: {name} must be a finite number, found {number!r}")
    low, high = (_point(key, table[name], config) for name in ("low", "high"))
    step, log = table.get("step"), table.get("log", False)
    if low >= high:
        raise UserError(f"{key}: low must be below high, found {low} and {high}")
    if not isinstance(log, bool):
        raise UserError(f"{key}: log must be true or false, found {log!r}")
    if log and low <= 0:
        raise UserError(f"{key}: log needs a low above 0, found {low}")
    if step is not None:
        if log:
            raise UserError(f"{key}: step and log exclude each other: the points of a step are even")
        if step <= 0 or (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step)):
            raise UserError(f"{key}: step {step} does not fit: it must lead from low, {low}, to high, {high}")
        if isinstance(low, int) and step % 1:
            raise UserError(f"{key}: step {step} does not fit: the key takes whole numbers")
        step = type(low)(step)
    return Axis(key, low=low, high=high, step=step, log=log)


def _point(key: str, value: Any, config: Config) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}: {value} is no finite number")
    return flat(_validated(config, {key: value}))[key]
