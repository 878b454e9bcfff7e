"""New models by a few dimensions: each preset is a variant of `config.model`, and `Saved` is any model at all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import model
from configs.typed import ConfigError, check_at_least
from model import Attention, Block, GatedMLP, ModelConfig, RMSNorm, Rope, SwiGLU, decoder
from model.blocks.deltanet import GatedDeltaNet
from model.blocks.mamba2 import Mamba2
from model.blocks.moe import MoE
from model.blocks.router import Router
from model.readouts.mtp import ParallelMTP, SequentialMTP


@dataclasses.dataclass(frozen=True)
class MTP:
    """Multi-token prediction (MTP), see `model.readouts.mtp`; its blocks equal the model's last block."""

    tokens: int = 0  # predicted tokens after the next one, each by its own module; 0: none
    layout: Literal["sequential", "parallel"] = "sequential"  # DeepSeek-V3; Gloeckle et al. 2024

    def __post_init__(self):
        check_at_least(0, tokens=self.tokens)

    def put_into(self, cfg: ModelConfig) -> ModelConfig:
        if self.tokens == 0:
            return cfg
        blocks = cfg.blocks[-1:] * self.tokens
        if self.layout == "parallel":
            return cfg.replace(mtp=ParallelMTP(blocks))
        return cfg.replace(mtp=SequentialMTP(blocks, cfg.final_norm or RMSNorm()))


@dataclasses.dataclass(frozen=True)
class Llama:
    """A Llama-like decoder: grouped-query attention with rotary positions, gated networks, RMS norms."""

    width: int = 256
    layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    ffn_width: int = 704
    rope_theta: float = 10_000.0
    qk_norm: bool = False
    norm_eps: float = 1e-5
    tied_head: bool = True
    max_length: int = 2048  # tokens of the longest supported context
    vocab_multiple: int = 64  # the vocabulary is padded to a multiple of this, so that it splits over devices
    mtp: MTP = MTP()

    def __post_init__(self):
        check_at_least(1, width=self.width, layers=self.layers, num_heads=self.num_heads)
        check_at_least(1, num_kv_heads=self.num_kv_heads, ffn_width=self.ffn_width)
        check_at_least(1, max_length=self.max_length, vocab_multiple=self.vocab_multiple)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}: each key/value "
                "head serves equally many query heads."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim}; wanted an even number: RoPE rotates pairs of channels."
            )

    def build(self, vocab_size: int) -> ModelConfig:
        """The model for a tokenizer of `vocab_size` tokens."""
        return self.mtp.put_into(self.stack(padded(vocab_size, self.vocab_multiple)))

    def stack(self, vocab_size: int) -> ModelConfig:
        """The model without multi-token prediction."""
        return decoder(
            vocab_size,
            self.width,
            self.layers,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.ffn_width,
            rope_theta=self.rope_theta,
            qk_norm=self.qk_norm,
            norm_eps=self.norm_eps,
            tied_head=self.tied_head,
            max_length=self.max_length,
        )


@dataclasses.dataclass(frozen=True)
class Mixture(Llama):
    """A mixture of experts (MoE): `Llama` with experts in place of the networks; see `model.blocks.moe.MoE`."""

    num_experts: int = 8  # `ffn_width` is the width of one expert
    experts_per_token: int = 2
    shared_width: int = 0  # width of an expert that every token uses; 0: none
    dense_layers: int = 0  # first blocks with a dense network, as wide as the experts of a token together
    dispatch: Literal["dropless", "capacity"] = "dropless"
    capacity_factor: float = 1.25
    balance_loss: float = 0.01
    balance_over: Literal["document", "batch"] = "document"  # "batch" needs config.microbatches=1
    router_z_loss: float = 0.001
    balance_rate: float = 0.0  # above 0: sigmoid scores and a choice bias, as in DeepSeek-V3; 1e-3 is usual

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, num_experts=self.num_experts, experts_per_token=self.experts_per_token)
        check_at_least(0, shared_width=self.shared_width, dense_layers=self.dense_layers)
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token}; wanted at most num_experts={self.num_experts}."
            )

    def stack(self, vocab_size: int) -> ModelConfig:
        return self.put_into(super().stack(vocab_size))

    def put_into(self, cfg: ModelConfig) -> ModelConfig:
        """A model with these experts in its blocks."""
        moe = MoE(
            self.num_experts,
            self.experts_per_token,
            GatedMLP(self.ffn_width),
            Router("sigmoid", choice_bias=True) if self.balance_rate else Router(),
            shared=GatedMLP(self.shared_width) if self.shared_width else None,
            dispatch=self.dispatch,
            capacity_factor=self.capacity_factor,
            balance_loss=self.balance_loss,
            balance_over=self.balance_over,
            z_loss=self.router_z_loss,
            balance_rate=self.balance_rate,
        )
        dense = GatedMLP(self.experts_per_token * self.ffn_width + self.shared_width)
        networks = [dense if i < self.dense_layers else moe for i in range(len(cfg.blocks))]
        blocks = zip(cfg.blocks, networks, strict=True)
        return cfg.replace(blocks=tuple(dataclasses.replace(block, ffn=ffn) for block, ffn in blocks))


@dataclasses.dataclass(frozen=True)
class Hybrid(Llama):
    """Recurrent blocks with attention at every `attention_every`-th: a state of constant size, and exact recall."""

    mixer: Literal["mamba2", "gated_deltanet"] = "mamba2"
    attention_every: int = 4  # the last of so many blocks attends; 0: none does
    state_dim: int = 64  # of each recurrent head
    recurrent_heads: int = 8
    recurrent_head_dim: int = 64

    def __post_init__(self):
        super().__post_init__()
        check_at_least(0, attention_every=self.attention_every)
        check_at_least(1, state_dim=self.state_dim, recurrent_heads=self.recurrent_heads)
        check_at_least(1, recurrent_head_dim=self.recurrent_head_dim)

    def stack(self, vocab_size: int) -> ModelConfig:
        norm = RMSNorm(self.norm_eps)
        attention = Attention(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            Rope(self.rope_theta),
            qk_norm=norm if self.qk_norm else None,
        )
        heads, width = self.recurrent_heads, self.recurrent_head_dim
        recurrent: Any = {
            "mamba2": Mamba2(heads, width, self.state_dim),
            "gated_deltanet": GatedDeltaNet(heads, heads, self.state_dim, width),
        }[self.mixer]
        attends = lambda i: self.attention_every > 0 and (i + 1) % self.attention_every == 0
        blocks = tuple(
            Block(attention if attends(i) else recurrent, SwiGLU(self.ffn_width), norm)
            for i in range(self.layers)
        )
        return ModelConfig(
            vocab_size, self.width, blocks, norm, tied_head=self.tied_head, max_length=self.max_length
        )


@dataclasses.dataclass(frozen=True)
class Saved:
    """Any model that `model/` can build, with new parameters.

    `config` is a model's saved form (`ModelConfig.to_dict()`); `path` is a JSON file with one, or what `init_from`
    takes: then only the architecture is read.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    vocab_multiple: int = 64  # the vocabulary is the tokenizer's, padded to a multiple of this; 0: as saved

    def __post_init__(self):
        if (self.path is None) == (self.config is None):
            raise ValueError("Saved needs either `path` or `config`.")
        check_at_least(0, vocab_multiple=self.vocab_multiple)

    def build(self, vocab_size: int) -> ModelConfig:
        cfg = self._read()
        if self.vocab_multiple:
            cfg = cfg.replace(vocab_size=padded(vocab_size, self.vocab_multiple))
        return cfg.replace(adapters=None)

    def _read(self) -> ModelConfig:
        if self.config is not None:
            return _from_saved(self.config, "config.model.config")
        assert self.path is not None
        if not self.path.endswith(".json"):
            return model.load_config(self.path)
        return _from_saved(read_json(self.path), self.path)


Preset = Llama | Mixture | Hybrid | Saved


def padded(vocab_size: int, multiple: int) -> int:
    return -(-vocab_size // multiple) * multiple


def read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"config.model.path={path}: not a JSON file: {error}") from None


def _from_saved(saved: Any, where: str) -> ModelConfig:
    try:
        return ModelConfig.from_dict(saved)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: no saved model config: {error}") from error
