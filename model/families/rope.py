"""Rotary positions in a config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
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


# Keys that do not change the numbers: a checkpoint's history, and a length that only some kinds use.
IGNORED = ("finetuned", "original_max_position_embeddings")


def read_rope(
    config: Reader,
    head_dim: int,
    *,
    theta: float = 10_000.0,
    fraction: float | None = None,
    fraction_key: str = "partial_rotary_factor",
    interleaved: bool = False,
    kinds: tuple[str, ...] = KINDS,
    length_key: str = "max_position_embeddings",
) -> Rope:
    """The rotary positions of a model.

    Args:
      theta: the family's default.
      fraction: the family's default share of rotated channels; None: the family rotates whole heads, and transformers
        ignores the key.
      fraction_key: the key of the fraction outside `rope_parameters`.
      length_key: the key of the longest context, which some scalings use.

    Raises:
      ValueError: settings that are not supported, or that this kind of scaling does not use.
    """
    old, new = config.part("rope_scaling"), config.part("rope_parameters")
    if old.saved and new.saved and old.saved != new.saved:
        raise ValueError("rope_scaling and rope_parameters mean the same, and disagree; keep one of them.")
    rope = new if new.saved else old
    for key in old.saved if rope is new else ():
        old.get(key)  # a copy
    theta = rope.number("rope_theta", config.number("rope_theta", theta))
    if "rope_theta" in config.saved and config.number("rope_theta") != theta:
        raise ValueError(
            f"rope_theta={config.saved['rope_theta']} disagrees with rope_parameters.rope_theta={theta}."
        )
    rotated = _read_fraction(config, rope, fraction_key, fraction or 1.0)
    if fraction is None and rotated != 1:
        raise ValueError(
            f"partial_rotary_factor={rotated} is not supported: this family rotates all channels of a head; only 1 is."
        )
    scaling = _read_scaling(config, rope, kinds, int(head_dim * rotated), length_key)
    for _, key, value in rope.unread():
        if value is not None and key not in IGNORED:
            raise ValueError(
                f"{rope.where}{key}={str(value)[:200]} is not supported with "
                f"rope_type={rope.get('rope_type') or rope.get('type') or 'default'!r}: "
                "it would be ignored. Give the type that it belongs to, or remove it."
            )
    return Rope(theta, scaling, rotated, interleaved)


def _read_fraction(config: Reader, rope: Reader, key: str, default: float) -> float:
    fraction = rope.number("partial_rotary_factor", config.number(key, default))
    if fraction > 1:
        raise ValueError(f"partial_rotary_factor={fraction} is more than the whole head.")
    return fraction


def _read_scaling(
    config: Reader, rope: Reader, kinds: tuple[str, ...], rotated: int, length_key: str
) -> Scaling | None:
    older = rope.get("type") or "default"
    kind = rope.get("rope_type") or older
    if kind == "su":
        kind = "longrope"
    nested = [key for key, value in rope.saved.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(
            f"rope_parameters has a part for each kind of layer ({nested}); one for all is supported."
        )
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"rope_type={str(kind)[:200]!r} is not supported; {', '.join(map(repr, kinds))} are."
        )
    if kind == "linear":
        return LinearScaling(rope.number("factor"))
    if kind == "llama3":
        return _read_llama3(config, rope, length_key)
    if kind == "yarn":
        return _read_yarn(config, rope, length_key)
    if kind == "longrope":
        return _read_longrope(config, rope, rotated // 2, length_key)
    return None


def _read_llama3(config: Reader, rope: Reader, length_key: str) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_length=_original_length(config, rope, length_key),
    )
    if scaling.high_freq_factor < scaling.low_freq_factor:
        raise ValueError(
            f"rope_parameters.high_freq_factor must not be below low_freq_factor; given {dict(rope.saved)}."
        )
    return scaling


def _read_yarn(config: Reader, rope: Reader, length_key: str) -> YarnScaling:
    original = _original_length(config, rope, length_key)
    factor = rope.number("factor", config.integer(length_key) / original)
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
    """The factor of cosine and sine in a context extended by `factor`. arXiv:2309.00071, section 3.4."""
    return 1.0 if factor <= 1 else 0.1 * amount * math.log(factor) + 1.0


def _read_longrope(config: Reader, rope: Reader, frequencies: int, length_key: str) -> LongRopeScaling:
    original = _original_length(config, rope, length_key)
    longest = config.integer(length_key)
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


def _original_length(config: Reader, rope: Reader, length_key: str) -> int:
    key = "original_max_position_embeddings"
    longest = config.integer(length_key)
    outside = config.integer(key, rope.integer(key, longest))
    if rope.integer(key, outside) != outside:
        raise ValueError(f"{key}={outside} disagrees with {rope.where}{key}={rope.integer(key)}.")
    return outside


def read_ropes(
    config: Reader,
    head_dim: int,
    thetas: Mapping[str, float],
    window_theta_key: str | None,
    kinds: tuple[str, ...] = KINDS,
) -> dict[str, Rope]:
    """The rotary positions of each kind of layer, "full_attention" and "sliding_attention".

    transformers 5 nests a part for each kind in `rope_parameters`. In the older layout only full attention has a
    scaling.

    Args:
      thetas: the family's defaults by kind of layer.
      window_theta_key: the older key of theta for layers with a window; None: the default.
      kinds: the scalings of the family.
    """
    both = config.part("rope_parameters")
    length = {"max_position_embeddings": config.get("max_position_embeddings")}
    if any(kind in both.saved for kind in thetas):
        wrong = set(both.saved) - set(thetas)
        if wrong:
            raise ValueError(f"rope_parameters has {sorted(wrong)} beside a part for each kind of layer.")
        parts = {kind: {"rope_parameters": both.get(kind)} for kind in thetas}
        if any(isinstance(part, dict) and part.get("truncate") is False for part in both.saved.values()):
            raise ValueError(
                "truncate=False in the rope_parameters of a kind of layer is not supported: transformers ignores it. "
                "Remove it."
            )
    else:
        keys = ("rope_theta", "rope_scaling", "rope_parameters")
        full = {key: config.get(key) for key in keys if key in config.saved}
        scaling = config.get("rope_scaling") or {}
        if "type" in scaling and "rope_type" not in scaling:
            raise ValueError(
                f"rope_scaling.type={str(scaling['type'])[:100]!r} is not supported: transformers ignores it. "
                "Write it as rope_scaling.rope_type."
            )
        window_theta = thetas["sliding_attention"]
        if window_theta_key is not None:
            window_theta = config.number(window_theta_key, window_theta)
        parts = {"full_attention": full, "sliding_attention": {"rope_theta": window_theta}}
    return {
        kind: read_rope(Reader(length | part), head_dim, theta=thetas[kind], kinds=kinds)
        for kind, part in parts.items()
    }


def write_ropes(mixers: Iterable[Any], thetas: Mapping[str, float]) -> dict[str, Any]:
    """The layout of transformers 5; `thetas` are for kinds of layers that the model lacks."""
    ropes = {bool(mixer.window): mixer.rope for mixer in mixers}
    pairs = {kind: ropes.get(kind == "sliding_attention", Rope(theta)) for kind, theta in thetas.items()}
    return {
        "rope_parameters": {
            kind: {"rope_theta": rope.theta, **(write_scaling(rope.scaling) or {"rope_type": "default"})}
            for kind, rope in pairs.items()
        }
    }


def write_rope(rope: Rope) -> dict[str, Any]:
    """The layout that transformers 4 and 5 both read."""
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
    raise ValueError(f"a config.json cannot express {type(scaling).__name__}")
