"""A recipe says which models to merge, how, and with which numbers for which layer and parameter.

It is a JSON file with the fields of `Recipe`:

    {"method": {"kind": "Ties"}, "base": "runs/base",
     "models": [{"model": "runs/maths", "weight": 0.5, "density": 0.2},
                {"model": "runs/code", "weight": {"ffn/*": [0, 1], "*": 0.5}, "density": 0.2}]}
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from configs.typed import ConfigError, build, did_you_mean
from model.blocks.linear import within_block
from model.merge.methods import Rescale

# A number; or numbers along the layers, interpolated linearly from the first layer to the last; or either by parameter,
# where the first pattern that matches decides: "q", "mixer/*", "block_0/*", "embedding". Outside the blocks, the first
# of several numbers counts.
Setting = float | tuple[float, ...] | dict[str, float | tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class Linear:
    """The weighted mean of the models; with normalize=False, their weighted sum."""

    normalize: bool = True

    settings: ClassVar[tuple[str, ...]] = ()  # the fields that are a `Setting`
    of_models: ClassVar[tuple[str, ...]] = ("weight",)  # the settings of each model that the method reads
    needs_base: ClassVar[bool] = False
    models: ClassVar[tuple[int, int | None]] = (1, None)  # least and greatest number


@dataclasses.dataclass(frozen=True)
class Slerp:
    """Spherical interpolation from the first of two models (t=0) to the second (t=1)."""

    t: Setting = 0.5

    settings: ClassVar[tuple[str, ...]] = ("t",)
    of_models: ClassVar[tuple[str, ...]] = ()
    needs_base: ClassVar[bool] = False
    models: ClassVar[tuple[int, int | None]] = (2, 2)


@dataclasses.dataclass(frozen=True)
class TaskArithmetic:
    """The base plus the weighted sum of the models' differences from it."""

    scale: Setting = 1.0  # the paper's lambda
    normalize: bool = False  # divide by the sum of the weights

    settings: ClassVar[tuple[str, ...]] = ("scale",)
    of_models: ClassVar[tuple[str, ...]] = ("weight",)
    needs_base: ClassVar[bool] = True
    models: ClassVar[tuple[int, int | None]] = (1, None)


@dataclasses.dataclass(frozen=True)
class Ties:
    """As task arithmetic, with the largest share `density` of each difference, where most models agree on the sign."""

    scale: Setting = 1.0  # the paper's lambda
    normalize: bool = True
    rescale: Rescale = "none"

    settings: ClassVar[tuple[str, ...]] = ("scale",)
    of_models: ClassVar[tuple[str, ...]] = ("weight", "density")
    needs_base: ClassVar[bool] = True
    models: ClassVar[tuple[int, int | None]] = (1, None)


@dataclasses.dataclass(frozen=True)
class Dare:
    """As task arithmetic, or TIES with elect_signs, with a random share `density` of each difference.

    The random numbers follow from the seed, the parameter's name and the model's place in the recipe.
    """

    scale: Setting = 1.0
    elect_signs: bool = False
    normalize: bool = False
    rescale: Rescale = "inverse"  # the paper's; mergekit's is "l1"
    seed: int = 0

    settings: ClassVar[tuple[str, ...]] = ("scale",)
    of_models: ClassVar[tuple[str, ...]] = ("weight", "density")
    needs_base: ClassVar[bool] = True
    models: ClassVar[tuple[int, int | None]] = (1, None)


@dataclasses.dataclass(frozen=True)
class ModelStock:
    """Between the base and the mean of the models, by the angle between their differences from the base."""

    filter_wise: bool = False

    settings: ClassVar[tuple[str, ...]] = ()
    of_models: ClassVar[tuple[str, ...]] = ()
    needs_base: ClassVar[bool] = True
    models: ClassVar[tuple[int, int | None]] = (2, None)


@dataclasses.dataclass(frozen=True)
class Passthrough:
    """One model's parameters, times `scale`; for slices of layers."""

    scale: Setting = 1.0

    settings: ClassVar[tuple[str, ...]] = ("scale",)
    of_models: ClassVar[tuple[str, ...]] = ()
    needs_base: ClassVar[bool] = False
    models: ClassVar[tuple[int, int | None]] = (1, 1)


Method = Linear | Slerp | TaskArithmetic | Ties | Dare | ModelStock | Passthrough


@dataclasses.dataclass(frozen=True)
class Source:
    """A model to merge; `weight` and `density` are 1 by default."""

    model: str  # run folder, checkpoint, Hugging Face folder or GGUF file
    weight: Setting | None = None
    density: Setting | None = None  # the share of its difference from the base that stays


@dataclasses.dataclass(frozen=True)
class LayerSource(Source):
    """Some layers of a model."""

    layers: tuple[int, int] = dataclasses.field(kw_only=True)  # from the first to before the second

    def __post_init__(self):
        if not 0 <= self.layers[0] < self.layers[1]:
            raise ValueError(
                f"layers={list(self.layers)}: wanted the first layer, and the layer after the last one."
            )


@dataclasses.dataclass(frozen=True)
class Slice:
    """Layers of the result, merged from as many layers of each source."""

    models: tuple[LayerSource, ...]
    base_layers: tuple[int, int] | None = None  # of the base; default: the layers of the first source
    method: Method | None = None  # default: the recipe's

    def __post_init__(self):
        ranges = [source.layers for source in self.models]
        ranges += [self.base_layers] if self.base_layers is not None else []
        if len({stop - start for start, stop in ranges}) != 1:
            given = ", ".join(str(list(pair)) for pair in ranges) or "none"
            raise ValueError(f"a slice has sources of equally many layers; given: {given}.")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to merge models. Parameters before the blocks are merged as the first slice, those after as the last."""

    method: Method
    models: tuple[Source, ...] = ()
    slices: tuple[Slice, ...] = ()  # instead of `models`: the result's layers in order
    base: str | None = None
    tokenizer: str | None = None  # the model that gives the tokenizer; default: the first source
    # The model that gives the config. Models then need equal shapes and kinds of blocks only, and may differ in rotary
    # frequencies, windows and constants. Default: the first source, and all must be equal.
    config: str | None = None

    def __post_init__(self):
        if bool(self.models) == bool(self.slices):
            raise ValueError("a recipe has either models, which are merged whole, or slices of their layers.")
        for i, part in enumerate(self.slices):
            self._check(part.method or self.method, part.models, f"slices[{i}].")
        if self.models:
            self._check(self.method, self.models, "")
        methods = [part.method or self.method for part in self.slices] or [self.method]
        if self.base is not None and not any(method.needs_base for method in methods):
            raise ValueError(
                f"base={self.base!r}: {_kinds(methods)} has no base. Leave it out, or name another method."
            )

    def _check(self, method: Method, sources: Sequence[Source], where: str) -> None:
        kind, (least, most) = type(method).__name__, method.models
        if len(sources) < least or (most is not None and len(sources) > most):
            wanted = f"{least}" if most == least else f"at least {least}"
            raise ValueError(f"{where}models has {len(sources)} models; {kind} merges {wanted}.")
        if method.needs_base and self.base is None:
            raise ValueError(f"{kind} needs `base`, the model that the others come from.")
        for i, source in enumerate(sources):
            if source.model == self.base and method.needs_base:
                raise ValueError(
                    f"{where}models[{i}] is the base, whose difference from itself is zero. Leave it out."
                )
            for name in ("weight", "density"):
                if getattr(source, name) is not None and name not in method.of_models:
                    raise ValueError(f"{where}models[{i}].{name}: {kind} has no {name}. Leave it out.")

    @property
    def sources(self) -> list[Source]:
        """All models to merge, in order, without the base."""
        return [*self.models, *(source for part in self.slices for source in part.models)]


def read_recipe(path: str | Path) -> Recipe:
    """The recipe of a JSON file. Raises ConfigError that names the key, and the nearest ones for an unknown key."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. Give a recipe, a JSON file; docs/model.md has one.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    return build(Recipe, content, f"{path}: recipe")


def value_of(setting: Setting, names: Sequence[str], depth: float, where: str) -> float:
    """The number that a setting has for a parameter.

    Args:
      names: the parameter's names for patterns; see `names_of`.
      depth: of its layer, 0 for the first and 1 for the last one.
      where: the setting's name in errors.

    Raises:
      ConfigError: no pattern matches, or the number is not finite.
    """
    if isinstance(setting, dict):
        found = [value for pattern, value in setting.items() if matches(names, pattern)]
        if not found:
            raise ConfigError(f'{where} has no pattern for {names[-1]}. Add "*": for all other parameters.')
        setting = found[0]
    if isinstance(setting, tuple):
        if not setting:
            raise ConfigError(f"{where} is an empty list; wanted numbers along the layers.")
        place = depth * (len(setting) - 1)
        below = min(int(place), len(setting) - 1)
        above = min(below + 1, len(setting) - 1)
        setting = (1 - (place - below)) * setting[below] + (place - below) * setting[above]
    if not math.isfinite(setting):
        raise ConfigError(f"{where} is {setting} for {names[-1]}; wanted a finite number.")
    return setting


def names_of(path: tuple[str, ...]) -> tuple[str, ...]:
    """What a pattern may match: ("q", "mixer/q", "block_0/mixer/q")."""
    return path[-1], "/".join(within_block(path)), "/".join(path)


def matches(names: Iterable[str], pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def check_patterns(recipe: Recipe, paths: Iterable[tuple[str, ...]]) -> None:
    """Raises ConfigError for a pattern that no parameter matches."""
    known = {name for path in paths for name in names_of(path)}
    for where, setting in _all_settings(recipe):
        for pattern in setting if isinstance(setting, dict) else ():
            if not matches(known, pattern):
                short = [name for name in known if not name.startswith("block_")]
                raise ConfigError(
                    f"{where}: no parameter matches {pattern!r}. " + did_you_mean(pattern, short)
                )


def _all_settings(recipe: Recipe) -> Iterable[tuple[str, Setting | None]]:
    methods = {"method": recipe.method}
    methods |= {f"slices[{i}].method": part.method for i, part in enumerate(recipe.slices) if part.method}
    for where, method in methods.items():
        yield from ((f"{where}.{name}", getattr(method, name)) for name in method.settings)
    for source in recipe.sources:
        yield from ((f"{name} of {source.model}", getattr(source, name)) for name in ("weight", "density"))


def _kinds(methods: Iterable[Any]) -> str:
    return " and ".join(dict.fromkeys(type(method).__name__ for method in methods))
