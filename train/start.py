"""Where the models of a run come from: files or new parameters, with new adapters and heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

import data
import model
from configs import ConfigError
from data import Tokenizer
from data.tokenize import fingerprint
from model import ModelConfig
from model.adapters import add_adapters, is_adapter, join, split_trained
from model.blocks import lora
from model.blocks.linear import within_block
from model.function import Params
from model.readouts.heads import Readout
from model.weights import is_quantized, shardings_like
from train.adapters import QLoRA
from train.config import LearnerConfig
from train.mesh import param_shardings
from train.models import Role
from train.presets import Preset


@dataclasses.dataclass(frozen=True)
class PolicyStart:
    """Where the policy comes from.

    Attributes:
      source: `config.init_from`; None: new parameters.
      cfg: with its adapters and head.
      base: the config at the source, which may be gone when a run goes on.
      new_adapters: those that the source does not have.
    """

    source: str | None
    cfg: ModelConfig
    base: Callable[[], ModelConfig]
    new_adapters: lora.LoRA | None
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class RoleStart:
    """A role's model before the first step; `load` reads or makes its parameters."""

    source: str
    cfg: ModelConfig
    shardings: Params
    load: Callable[[], Params]


def policy_start(
    config: LearnerConfig,
    role: Role,
    tokenizer: Tokenizer,
    begun: Path | None = None,
    preset: Preset | None = None,
) -> PolicyStart:
    """The policy of a run; one that has begun takes its model from its own checkpoint.

    Raises:
      ConfigError: neither `init_from` nor a preset, adapters that fit nothing, or another model than the run has.
    """
    adapters = None if config.adapters is None else config.adapters.build()
    if config.init_from is None and preset is None and begun is not None:
        cfg = config.run.apply_to(model.load_config(begun))
        return PolicyStart(None, cfg, lambda: cfg, None, tokenizer)
    if config.init_from is None:
        if adapters is not None:
            raise ConfigError("config.adapters adapt a model: give config.init_from.")
        if preset is None:
            raise ConfigError("give config.init_from: the run folder or model that the policy starts from.")
        built = config.run.apply_to(preset.build(tokenizer.vocab_size))
        return PolicyStart(None, with_head(built, role.head), lambda: built, None, tokenizer)
    source = config.init_from
    base = lambda: config.run.apply_to(model.load_config(source))
    if begun is None:
        cfg = with_head(base(), role.head)
        return PolicyStart(source, _with_adapters(source, cfg, adapters), base, adapters, tokenizer)
    cfg = config.run.apply_to(model.load_config(begun))
    if adapters is not None and cfg.adapters != adapters:
        raise ConfigError(
            f"{begun} trains {cfg.adapters or 'no adapters'}, and config.adapters asks for {adapters}. Give the old "
            "values, or start a new run in another --workdir."
        )
    return PolicyStart(source, cfg, base, adapters, tokenizer)


def role_start(config: LearnerConfig, name: str, role: Role, policy: PolicyStart, mesh: Mesh) -> RoleStart:
    """The start of any role.

    Raises:
      ConfigError: the role's source has another vocabulary than the policy, or lacks the head that the role needs.
    """
    rules = role.rules or config.sharding
    if policy.source is None and role.source is None and not role.trained:
        raise ConfigError(
            f"give config.init_from: the {name} is the policy as it was at the start of the run."
        )
    if name == "policy" or role.source is None:
        cfg = policy.cfg if role.head is None else with_head(policy.cfg, role.head)
        source = policy.source or "the new policy"
    else:
        source = role.source
        stored = config.run.apply_to(model.load_config(source))
        _check_vocabulary(name, source, stored, policy)
        if role.needs_head and role.head not in stored.heads:
            found = ", ".join(head.name for head in stored.heads) or "none"
            raise ConfigError(
                f"config.algorithm.{name}={source} has no head {role.head and role.head.name!r} (its heads: {found}). "
                "Give a model that was trained with the algorithm RewardModel."
            )
        cfg = with_head(stored, role.head)
    layout = param_shardings(cfg, mesh, rules)

    def load() -> Params:
        if name == "policy" or role.source is None:
            params = _policy_params(config, policy, cfg, mesh, rules, layout)
        else:
            base = config.run.apply_to(model.load_config(source))
            params = _read(source, base, param_shardings(base, mesh, rules), _dtype_on_load(config, role))
            params = _with_new_heads(cfg, params, role.head_from)
        params = kept(config, role, cfg, params)
        return jax.device_put(params, shardings_like(params, layout))

    return RoleStart(source, cfg, layout, load)


def with_head(cfg: ModelConfig, head: Readout | None) -> ModelConfig:
    """The model with a readout; unchanged if it has one of this name."""
    if head is None or head.name in {each.name for each in cfg.heads}:
        return cfg
    return cfg.replace(heads=(*cfg.heads, head))


def kept(config: LearnerConfig, role: Role, cfg: ModelConfig, params: Params) -> Params:
    """Parameters in the dtypes in which a role's are kept: what is trained, and what is frozen."""
    trained, rest = split_trained(params)
    if not role.trained:
        trained, rest = {}, params
    if any(is_quantized(leaf) for leaf in jax.tree.leaves(trained, is_leaf=is_quantized)):
        raise ConfigError(
            "the weights of config.init_from are quantized, and quantized weights are not trained: give "
            "config.adapters, or a model with dense weights."
        )
    trained = in_dtype(cfg, trained, config.precision.params_at_start)
    if rest and role.trained and isinstance(config.adapters, QLoRA):
        rest = _frozen_as(cfg, rest, config.adapters.base, config.adapters)
    elif rest and (frozen := role.dtype or config.precision.frozen) is not None:
        rest = _frozen_as(cfg, rest, frozen, QLoRA())
    return join(trained, rest) if trained else rest


def _frozen_as(cfg: ModelConfig, params: Params, dtype: str, how: QLoRA) -> Params:
    """In a dtype, or quantized as `how` says, with what is not quantized in bfloat16."""
    few_bits = dtype in ("int8", "nf4")
    halved = in_dtype(cfg, params, "bfloat16" if few_bits else dtype)
    if not few_bits:
        return halved
    plain = cfg.replace(adapters=None)
    if any(is_quantized(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_quantized)):
        return halved  # the source is quantized already
    try:
        quantized = model.quantize(plain, params, cast(Any, dtype), how.block, double=how.double_quantized)
    except ValueError as error:
        raise ConfigError(
            f"{error} All linear maps are quantized: config.adapters.block sets the block of QLoRA, and "
            f"config.precision.frozen={dtype} has that of the format."
        ) from None
    pick = lambda new, half: new if is_quantized(new) else half
    return jax.tree.map(pick, quantized, halved, is_leaf=is_quantized)


def in_dtype(cfg: ModelConfig, params: Params, dtype: str) -> Params:
    """Dense parameters in a dtype, but for those that a model has in float32 whatever its dtype is."""
    wanted = cast(dict[Any, Any], flatten_dict(model.param_shapes(cfg.replace(param_dtype=dtype))))
    flat = cast(dict[Any, Any], flatten_dict(params))
    cast_to = lambda path, x: x if is_quantized(x) else x.astype(wanted[path].dtype)
    return cast(Params, unflatten_dict({path: cast_to(path, x) for path, x in flat.items()}))


def _policy_params(
    config: LearnerConfig, policy: PolicyStart, cfg: ModelConfig, mesh: Mesh, rules: Any, layout: Params
) -> Params:
    """The policy's parameters at the start, also for roles that start as it does, perhaps with one head more."""
    if policy.source is None:
        make = jax.jit(lambda key: model.init(cfg, key), out_shardings=layout)
        return make(jax.random.key(config.seed))
    base = policy.base()
    dtype = None if cfg.adapters is not None else config.precision.params_at_start
    params = _read(policy.source, base, param_shardings(base, mesh, rules), dtype)
    params = _with_new_heads(cfg, params)
    if policy.new_adapters is not None:
        plain = cfg.replace(adapters=None)
        _, params = add_adapters(plain, params, policy.new_adapters, jax.random.key(config.seed))
    return params


def _read(source: str, cfg: ModelConfig, shardings: Params, dtype: str | None) -> Params:
    return model.load(source, cfg=cfg, shardings=shardings, dtype=dtype)[1]


def _dtype_on_load(config: LearnerConfig, role: Role) -> str | None:
    dtype = config.precision.params_at_start if role.trained else role.dtype or config.precision.frozen
    return "bfloat16" if dtype == "bfloat16" else None


def _with_new_heads(cfg: ModelConfig, params: Params, like: str | None = None) -> Params:
    """With the readouts that `cfg` has and `params` lack; they start at zero, or as the readout `like` is."""
    shapes, new = model.param_shapes(cfg), {}
    for head in cfg.heads:
        for end in ("_head", "_head_bias"):
            name, other = f"{head.name}{end}", f"{like}{end}"
            if name in shapes and name not in params:
                zeros = jnp.zeros(shapes[name].shape, shapes[name].dtype)
                new[name] = jnp.array(params[other], zeros.dtype) if other in params else zeros
    return params | new


def _with_adapters(source: str, cfg: ModelConfig, adapters: lora.LoRA | None) -> ModelConfig:
    if adapters is None:
        return cfg
    if cfg.adapters is not None:
        raise ConfigError(
            f"config.adapters: {source} has adapters already ({cfg.adapters}). Leave out config.adapters to train them "
            "further, or give config.init_from the model with its adapters merged."
        )
    adapted = cfg.replace(adapters=adapters)
    paths = cast(list[tuple[str, ...]], list(flatten_dict(model.param_shapes(adapted))))
    if not any(map(is_adapter, paths)):
        names = sorted({"/".join(within_block(path)) for path in paths if len(path) > 1})
        raise ConfigError(
            f"config.adapters.targets={adapters.targets}: no linear map of the model matches. Its parameters are "
            f"{', '.join(names)}."
        )
    return adapted


def _check_vocabulary(name: str, source: str, cfg: ModelConfig, policy: PolicyStart) -> None:
    """The role reads the policy's token ids, so both have one tokenizer."""
    try:
        theirs = data.load_tokenizer(source)
    except (FileNotFoundError, ValueError):
        theirs = None
    ours = policy.tokenizer
    if theirs is None and cfg.vocab_size == policy.cfg.vocab_size:
        return
    if theirs is not None and (theirs.vocab_size == ours.vocab_size and _same_ids(theirs, ours)):
        return
    size = cfg.vocab_size if theirs is None else theirs.vocab_size
    raise ConfigError(
        f"config.algorithm.{name}={source} has another vocabulary ({size} tokens) than the policy ({ours.vocab_size} "
        "tokens), and both read the same ids. Give a model with the policy's tokenizer."
    )


def _same_ids(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether every id stands for the same bytes; chat templates may differ."""
    if fingerprint(a) == fingerprint(b):
        return True
    return all(a.bytes_of(i) == b.bytes_of(i) for i in range(a.vocab_size))
