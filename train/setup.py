"""A run's parts from its config: tokenizer, mesh, models; checked against each other before anything is loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

import data
import model
from configs import ConfigError
from data import Tokenizer
from model import ModelConfig
from model.blocks.moe import MoE
from train.checkpoints import has_checkpoint
from train.checks import check_datasets, check_same_model, check_validation
from train.config import TrainConfig
from train.learner import Plan, make_plan
from train.mesh import check_mesh, make_mesh
from train.start import policy_start, with_head


@dataclasses.dataclass
class Setup:
    """The parts of a run, built from its config."""

    config: TrainConfig
    tokenizer: Tokenizer
    plan: Plan

    @property
    def cfg(self) -> ModelConfig:
        """The policy's config."""
        return self.plan.cfgs["policy"]

    @property
    def mesh(self) -> Mesh:
        return self.plan.mesh


def prepare_run(config: TrainConfig, workdir: Path | None = None) -> Setup:
    """Build a run; one that has begun in `workdir` takes its model and tokenizer from there."""
    mesh = make_mesh(config.mesh)
    begun = workdir if workdir is not None and has_checkpoint(workdir) else None
    source = begun or config.tokenizer or config.init_from
    if source is None:
        raise ConfigError("give config.tokenizer (a tokenizer or run folder) or config.init_from.")
    tokenizer = data.load_tokenizer(source)
    config = dataclasses.replace(config, data=config.data.with_tokenizer(tokenizer))
    _check_batch(config, mesh)
    roles = config.algorithm.roles()
    follows = [name for name, role in roles.items() if name != "policy" and role.source is None]
    if config.init_from is None and follows:
        raise ConfigError(
            f"the algorithm {type(config.algorithm).__name__} compares with the policy as it was at the start "
            f"({follows[0]}): give config.init_from."
        )
    policy = policy_start(config, roles["policy"], tokenizer, begun, config.model)
    cfg = policy.cfg
    if begun is not None and config.init_from is None:
        stored = config.run.apply_to(model.load_config(begun))
        check_same_model(stored, with_head(cfg, roles["policy"].head), begun, config.model)
    _check_balance(config, cfg)
    check_mesh(cfg, mesh, config.sharding)
    if cfg.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"the tokenizer {source} has {tokenizer.vocab_size} tokens and the model {cfg.vocab_size} rows for them. "
            "Use the tokenizer that the model was trained with."
        )
    check_datasets(config.data, tokenizer, source, cfg.vocab_size)
    check_validation(config.data, config.batch_kind)
    algorithm = config.algorithm.with_tokenizer(tokenizer)
    return Setup(config, tokenizer, make_plan(config, algorithm, policy, mesh))


def _check_balance(config: TrainConfig, cfg: ModelConfig) -> None:
    networks = [network for block in cfg.blocks for network in block.networks]
    over_batch = any(isinstance(n, MoE) and n.balance_over == "batch" and n.balance_loss for n in networks)
    if over_batch and config.microbatches > 1:
        raise ConfigError(
            f"balance_over='batch' balances the load of a whole batch, and config.microbatches={config.microbatches} "
            "cuts it. Set config.microbatches=1, or balance_over='document'."
        )


def _check_batch(config: TrainConfig, mesh: Mesh) -> None:
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = 2 if config.batch_kind == "preference" else 1
    if config.data.batch_size < config.algorithm.min_rows:
        raise ConfigError(
            f"config.data.batch_size={config.data.batch_size}: {type(config.algorithm).__name__} compares each row "
            f"with another one of its batch. Use at least {config.algorithm.min_rows}."
        )
    unit = ways * rows * config.microbatches
    if config.data.batch_size % unit:
        raise ConfigError(
            f"config.data.batch_size={config.data.batch_size} is not a multiple of {unit} = data*fsdp devices ({ways}) "
            f"* microbatches ({config.microbatches}) * rows an example ({rows}). Use "
            f"{max(unit, config.data.batch_size // unit * unit)}."
        )
    if not config.data.mixture:
        raise ConfigError("config.data.mixture is empty: name at least one token dataset and its weight.")
