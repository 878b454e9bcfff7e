"""The config of a training run: frozen dataclasses, filled from a config file and command-line overrides."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Literal

import jax

from data.mixture import BatchSpec
from model import GatedMLP, ModelConfig, RMSNorm, ShardingRules, decoder
from model.blocks.lora import LoRA
from model.blocks.moe import MoE
from model.blocks.router import Router
from model.kernels.backend import Kernels
from model.readouts.mtp import ParallelMTP, SequentialMTP


def check_at_least(least: int, **values: int) -> None:
    """Raises ValueError that names the first key below `least`."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name}={value}; wanted at least {least}.")


@dataclasses.dataclass(frozen=True)
class MoESpec:
    """A mixture of experts in place of the blocks' feed-forward networks; fields as in `model.blocks.moe.MoE`."""

    num_experts: int = 0  # 0: no experts; else `ffn_width` is the width of one expert
    experts_per_token: int = 2
    shared_width: int = 0  # width of an expert that every token uses; 0: none
    dense_layers: int = 0  # first blocks with a dense network, as wide as the experts of a token together
    dispatch: Literal["dropless", "capacity"] = "dropless"
    capacity_factor: float = 1.25
    balance_loss: float = 0.01
    balance_over: Literal["document", "batch"] = "document"  # "batch" needs config.microbatches=1
    z_loss: float = 0.001
    balance_rate: float = 0.0  # above 0: sigmoid scores and a choice bias, as in DeepSeek-V3; 1e-3 is usual

    def __post_init__(self):
        check_at_least(0, num_experts=self.num_experts, shared_width=self.shared_width)
        check_at_least(0, dense_layers=self.dense_layers)
        check_at_least(1, experts_per_token=self.experts_per_token)
        if self.num_experts and self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token}; wanted at most num_experts={self.num_experts}."
            )

    def put_into(self, cfg: ModelConfig, ffn_width: int) -> ModelConfig:
        router = Router("sigmoid", choice_bias=True) if self.balance_rate else Router()
        moe = MoE(
            self.num_experts,
            self.experts_per_token,
            GatedMLP(ffn_width),
            router,
            shared=GatedMLP(self.shared_width) if self.shared_width else None,
            dispatch=self.dispatch,
            capacity_factor=self.capacity_factor,
            balance_loss=self.balance_loss,
            balance_over=self.balance_over,
            z_loss=self.z_loss,
            balance_rate=self.balance_rate,
        )
        dense = GatedMLP(self.experts_per_token * ffn_width + self.shared_width)
        networks = [dense if i < self.dense_layers else moe for i in range(len(cfg.blocks))]
        blocks = zip(cfg.blocks, networks, strict=True)
        return cfg.replace(blocks=tuple(dataclasses.replace(block, ffn=ffn) for block, ffn in blocks))


@dataclasses.dataclass(frozen=True)
class MTPSpec:
    """Multi-token prediction (MTP), see `model.readouts.mtp`; its blocks equal the model's last block."""

    tokens: int = 0  # predicted tokens after the next one, each by its own module; 0: none
    kind: Literal["sequential", "parallel"] = "sequential"  # DeepSeek-V3; Gloeckle et al. 2024

    def __post_init__(self):
        check_at_least(0, tokens=self.tokens)

    def put_into(self, cfg: ModelConfig) -> ModelConfig:
        if self.tokens == 0:
            return cfg
        blocks = cfg.blocks[-1:] * self.tokens
        if self.kind == "parallel":
            return cfg.replace(mtp=ParallelMTP(blocks))
        return cfg.replace(mtp=SequentialMTP(blocks, cfg.final_norm or RMSNorm()))


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The dimensions of a new Llama-like decoder; ignored when `init_from` names a model."""

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
    moe: MoESpec = MoESpec()
    mtp: MTPSpec = MTPSpec()

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

    def build(self, vocab_size: int, run: Execution) -> ModelConfig:
        padded = -(-vocab_size // self.vocab_multiple) * self.vocab_multiple
        cfg = decoder(
            padded,
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
        if self.moe.num_experts:
            cfg = self.moe.put_into(cfg, self.ffn_width)
        return run.apply_to(self.mtp.put_into(cfg))


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the model runs: speed and memory. Results change by rounding only."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters stay float32
    scan: bool | None = None  # one lax.scan over equal blocks; None: on TPUs and GPUs, not on CPUs
    # what is saved for the backward pass: everything, matrix products, these in host memory, or only blocks' inputs
    remat: Literal["none", "products", "offload", "full"] = "none"

    kernels: Kernels = Kernels()  # the implementation of each operation; "auto": the platform's

    def apply_to(self, cfg: ModelConfig) -> ModelConfig:
        scan = jax.default_backend() != "cpu" if self.scan is None else self.scan
        how = {"scan": scan, "remat": self.remat, "kernels": self.kernels}
        return cfg.replace(dtype=self.dtype, param_dtype="float32", **how)


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """LoRA for the model of `init_from`; only adapters are trained. Fields as in `model.blocks.lora.LoRA`."""

    rank: int = 0  # 0: no adapters, all parameters are trained
    alpha: float = 16.0
    targets: tuple[str, ...] = ("*",)
    rank_stabilized: bool = False
    decomposed: bool = False

    def __post_init__(self):
        check_at_least(0, rank=self.rank)
        self.build()  # checks the values

    def build(self) -> LoRA | None:
        if not self.rank:
            return None
        return LoRA(self.rank, self.alpha, self.targets, 1, self.rank_stabilized, self.decomposed)


@dataclasses.dataclass(frozen=True)
class DataSpec(BatchSpec):
    """Token datasets (folders written by data/), mixed by weight; see `data.mixture.BatchSpec`."""

    validation: dict[str, float] = field(default_factory=dict)  # folder -> weight; empty: no validation loss
    validation_batches: int = 8
    check_tokenizer: bool = True  # refuse datasets that were written with another tokenizer

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, validation_batches=self.validation_batches)


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """AdamW with decoupled weight decay of matrices. Loshchilov and Hutter 2017, arXiv:1711.05101."""

    peak_lr: float = 1e-3
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"  # after a linear warmup
    warmup_steps: int = 100
    decay_steps: int = 0  # "wsd": steps of the final linear decay; 0: a fifth of all steps
    final_lr_fraction: float = 0.1  # learning rate at the last step, as a share of the peak
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # global gradient norm; 0: no clipping

    def __post_init__(self):
        check_at_least(0, warmup_steps=self.warmup_steps, decay_steps=self.decay_steps)


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """Devices along each axis of the mesh; one axis may be -1: all remaining devices."""

    data: int = -1
    fsdp: int = 1
    stage: int = 1
    context: int = 1
    expert: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class CheckpointSpec:
    every: int = 500  # steps; the last step is always saved
    keep: int = 2  # how many of the newest checkpoints stay
    keep_every: int = 0  # checkpoints at multiples of this stay for good; 0: none

    def __post_init__(self):
        check_at_least(1, every=self.every, keep=self.keep)
        check_at_least(0, keep_every=self.keep_every)


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    every: int = 0  # steps; 0: no samples
    prompts: tuple[str, ...] = ()  # continued as text; with `chat`, each is a user's message
    chat: bool = False
    max_new_tokens: int = 48
    temperature: float = 0.0

    def __post_init__(self):
        check_at_least(0, every=self.every)
        check_at_least(1, max_new_tokens=self.max_new_tokens)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run: an objective on a data mixture."""

    # lm: pretraining and fine-tuning; the dataset's mask selects the tokens
    objective: Literal["lm", "dpo"] = "lm"
    init_from: str | None = None  # run folder, checkpoint, Hugging Face folder or GGUF file to start from
    tokenizer: str | None = None  # default: the tokenizer of init_from
    steps: int = 1000
    seed: int = 0
    microbatches: int = 1  # the batch is split into this many parts; their gradients are added
    z_loss: float = 0.0  # coefficient of log(Z)^2; 1e-4 is usual
    mtp_weight: float = 0.3  # coefficient of the mean MTP loss; 0: MTP modules are not trained
    dpo_beta: float = 0.1  # strength of the penalty for leaving the reference
    dpo_label_smoothing: float = 0.0  # above 0: conservative DPO
    max_bad_steps: int = 10  # steps in a row without a finite loss and gradient before the run stops
    log_every: int = 10
    validate_every: int = 0  # steps; 0: at the end only
    model: ModelSpec = ModelSpec()
    adapters: AdapterSpec = AdapterSpec()
    run: Execution = Execution()
    data: DataSpec = DataSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    mesh: MeshSpec = MeshSpec()
    sharding: ShardingRules = ShardingRules()
    checkpoint: CheckpointSpec = CheckpointSpec()
    samples: SampleSpec = SampleSpec()

    def __post_init__(self):
        check_at_least(1, steps=self.steps, microbatches=self.microbatches, log_every=self.log_every)
        check_at_least(1, max_bad_steps=self.max_bad_steps)
        check_at_least(0, validate_every=self.validate_every)

    @property
    def batch_kind(self) -> Literal["lm", "preference"]:
        """The kind of batches that the objective takes."""
        return "preference" if self.objective == "dpo" else "lm"
