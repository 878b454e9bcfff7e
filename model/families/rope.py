"""Rotary positions in a config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`."""

from __future__ import annotations

import math
from typing import Any

from model.blocks.positions import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    Scaling,
    YarnScaling,
)
from model.families.common import Reader

KINDS = ("default", "linear", "llama3", "yarn", "longrope")


def read_rope(
    config: Reader,
    head_dim: int,
    *,
    theta: float = 10_000.0,
    fraction: float = 1.0,
    fraction_key: str = "partial_rotary_factor",
    interleaved: bool = False,
    kinds: tuple[str, ...] = KINDS,
    original_factor: bool = False,
) -> Rope:
    """The rotary positions of a model.

    Args:
      theta, fraction: the family's defaults.
      fraction_key: where the fraction of the rotated channels stands outside `rope_parameters`; "": nowhere.
      original_factor: the factor of a stretched context is max_position_embeddings over the original length, whatever
        `factor` says.
    """
    old, new = config.part("rope_scaling"), config.part("rope_parameters")
    rope = new if new.saved else old
    theta = rope.number("rope_theta", config.number("rope_theta", theta))
    if "rope_theta" in config.saved and config.number("rope_theta") != theta:
        raise ValueError(
            f"rope_theta={config.saved['rope_theta']} disagrees with rope_parameters.rope_theta={theta}."
        )
    if fraction_key:
        fraction = config.number(fraction_key, fraction)
    fraction = rope.number("partial_rotary_factor", fraction)
    if fraction > 1:
        raise ValueError(f"partial_rotary_factor={fraction} is more than the whole head.")
    return Rope(theta, _read_scaling(config, rope, kinds, int(head_dim * fraction)), fraction, interleaved)


def _read_scaling(config: Reader, rope: Reader, kinds: tuple[str, ...], rotated: int) -> Scaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "su":
        kind = "longrope"
    nested = [key for key, value in rope.saved.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(
            f"rope_parameters has a part for each kind of layer ({nested}); one for all is supported."
        )
    if kind not in kinds:
        raise ValueError(f"rope_type={kind!r} is not supported; {', '.join(map(repr, kinds))} are.")
    if kind == "linear":
        return LinearScaling(rope.number("factor"))
    if kind == "llama3":
        return _read_llama3(rope)
    if kind == "yarn":
        return _read_yarn(config, rope)
    if kind == "longrope":
        return _read_longrope(config, rope, rotated // 2)
    return None


def _read_llama3(rope: Reader) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_length=rope.integer("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ValueError(
            f"rope_parameters.high_freq_factor must be above low_freq_factor; given {dict(rope.saved)}."
        )
    return scaling


def _read_yarn(config: Reader, rope: Reader) -> YarnScaling:
    original = _original_length(config, rope)
    factor = rope.number("factor", config.integer("max_position_embeddings") / original)
    magnitude = yarn_magnitude(factor)
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        above, below = rope.number("mscale"), rope.number("mscale_all_dim")
        magnitude = yarn_magnitude(factor, above) / yarn_magnitude(factor, below)
    return YarnScaling(
        factor,
        original,
        rope.number("beta_fast", 32.0),
        rope.number("beta_slow", 1.0),
        rope.number("attention_factor", magnitude),
        rope.flag("truncate", True),
    )


def yarn_magnitude(factor: float, amount: float = 1.0) -> float:
    """How much larger scores' factors become in a context stretched by `factor`. arXiv:2309.00071, section 3.4."""
    return 1.0 if factor <= 1 else 0.1 * amount * math.log(factor) + 1.0


def _read_longrope(config: Reader, rope: Reader, frequencies: int) -> LongRopeScaling:
    original = _original_length(config, rope)
    longest = config.integer("max_position_embeddings")
    factor = rope.number("factor", longest / original)
    magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    divisors = {}
    for key in ("short_factor", "long_factor"):
        values = rope.value(key, None)
        numbers = isinstance(values, list) and all(type(v) in (int, float) and v > 0 for v in values)
        if not numbers or len(values) != frequencies:
            raise ValueError(
                f"{rope.where}{key}={str(values)[:200]} is not a list of {frequencies} positive numbers, one for "
                "each frequency."
            )
        divisors[key] = tuple(float(v) for v in values)
    return LongRopeScaling(
        divisors["short_factor"],
        divisors["long_factor"],
        original,
        rope.number("attention_factor", magnitude),
    )


def _original_length(config: Reader, rope: Reader) -> int:
    longest = config.integer("max_position_embeddings")
    outside = config.integer("original_max_position_embeddings", longest)
    return rope.integer("original_max_position_embeddings", outside)


def write_rope(rope: Rope) -> dict[str, Any]:
    """In the form that transformers 4 and 5 both read."""
    saved = {"rope_theta": rope.theta, "rope_scaling": write_scaling(rope.scaling)}
    return saved if rope.fraction == 1 else saved | {"partial_rotary_factor": rope.fraction}


def write_scaling(scaling: Scaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_length,
        }
    if isinstance(scaling, YarnScaling):
        return {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_length,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "attention_factor": scaling.magnitude,
            "truncate": scaling.truncate,
        }
    if isinstance(scaling, LongRopeScaling):
        return {
            "rope_type": "longrope",
            "short_factor": list(scaling.short),
            "long_factor": list(scaling.long),
            "original_max_position_embeddings": scaling.original_max_length,
            "attention_factor": scaling.magnitude,
        }
    raise ValueError(f"a config.json has no word for {type(scaling).__name__}")
