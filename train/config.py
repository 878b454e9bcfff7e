"""The config of a training run: frozen dataclasses, filled from a config file and command-line overrides."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Literal, cast

import jax

from configs.typed import check_at_least
from data import Tokenizer
from data.batches import BatchKind
from data.mixture import BatchSpec
from model import ModelConfig, ShardingRules
from model.kernels.backend import Kernels
from train.adapters import Adapters
from train.algorithms import AnyAlgorithm, LanguageModelling
from train.models import KeptDtype
from train.optimizers import AdamW, Optimizer
from train.presets import Llama, Preset
from train.schedules import Cosine, Schedule


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the model runs: speed and memory. Results change by rounding only."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; see config.precision for parameters
    scan: bool | None = None  # one lax.scan over equal blocks; None: on TPUs and GPUs, not on CPUs
    # what is saved for the backward pass: everything, matrix products, these in host memory, or only blocks' inputs
    remat: Literal["none", "products", "offload", "full"] = "none"

    kernels: Kernels = Kernels()  # the implementation of each operation; "auto": the platform's

    def apply_to(self, cfg: ModelConfig) -> ModelConfig:
        scan = jax.default_backend() != "cpu" if self.scan is None else self.scan
        how = {"scan": scan, "remat": self.remat, "kernels": self.kernels}
        return cfg.replace(dtype=self.dtype, param_dtype="float32", **how)


@dataclasses.dataclass(frozen=True)
class Precision:
    """How parameters are kept. Gradients are summed in float32, whatever it is."""

    params: Literal["float32", "bfloat16"] = "float32"  # of trained parameters, adapters included
    # how bfloat16 parameters take small steps: float32 masters in the optimizer's state, or stochastic rounding
    # without them; "nearest" loses steps below half a unit in the last place
    rounding: Literal["masters", "stochastic", "nearest"] = "masters"
    # of models that no gradient changes (references, teachers, rewards); None: as they are trained or stored
    frozen: KeptDtype | None = None

    @property
    def masters(self) -> bool:
        """Whether the optimizer's state has float32 copies of the parameters."""
        return self.params == "bfloat16" and self.rounding == "masters"

    @property
    def params_at_start(self) -> Literal["float32", "bfloat16"]:
        """The dtype in which trained parameters are read: masters have every bit of the source."""
        return "float32" if self.masters else self.params


@dataclasses.dataclass(frozen=True)
class DataSpec(BatchSpec):
    """Token datasets (folders written by data/), mixed by weight; see `data.mixture.BatchSpec`."""

    validation: dict[str, float] = field(default_factory=dict)  # folder -> weight; empty: no validation loss
    validation_batches: int = 8
    check_tokenizer: bool = True  # refuse datasets that were written with another tokenizer

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, validation_batches=self.validation_batches)

    def with_tokenizer(self, tokenizer: Tokenizer) -> DataSpec:
        """With the tokenizer's ids of what hides spans. Raises ConfigError for tokens that it has not."""
        if self.spans is None:
            return self
        return dataclasses.replace(self, spans=self.spans.with_tokenizer(tokenizer))


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
class ForgettingSpec:
    """On which text a fine-tuned model is compared with itself before: see train/forgetting.py."""

    mixture: dict[str, float] = field(
        default_factory=dict
    )  # datasets; empty: the validation data of init_from's run
    batches: int = 8  # of each dataset, before and after; 0: no comparison

    def __post_init__(self):
        check_at_least(0, batches=self.batches)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """What every run that trains has in common."""

    init_from: str | None = None  # run folder, checkpoint, Hugging Face folder or GGUF file to start from
    steps: int = 1000
    seed: int = 0
    microbatches: int = 1  # the batch is split into this many parts; their gradients are added
    max_bad_steps: int = 10  # steps in a row without a finite loss and gradient before the run stops
    adapters: Adapters | None = None  # None: all parameters are trained
    optimizer: Optimizer = AdamW()
    schedule: Schedule = Cosine()
    average_decay: float = (
        0.0  # above 0: a moving average of the weights keeps this share at each step; 0.999 is usual
    )
    precision: Precision = Precision()
    run: Execution = Execution()
    mesh: MeshSpec = MeshSpec()
    sharding: ShardingRules = ShardingRules()
    checkpoint: CheckpointSpec = CheckpointSpec()

    def __post_init__(self):
        check_at_least(1, steps=self.steps, microbatches=self.microbatches)
        check_at_least(1, max_bad_steps=self.max_bad_steps)
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay={self.average_decay}; wanted at least 0 and less than 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(LearnerConfig):
    """One training run: an algorithm on a data mixture."""

    algorithm: AnyAlgorithm = LanguageModelling()
    tokenizer: str | None = None  # default: the tokenizer of init_from
    model: Preset = Llama()  # a new model; ignored where `init_from` names one
    log_every: int = 10
    validate_every: int = 0  # steps; 0: at the end only
    data: DataSpec = DataSpec()
    samples: SampleSpec = SampleSpec()
    forgetting: ForgettingSpec = ForgettingSpec()

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, log_every=self.log_every)
        check_at_least(0, validate_every=self.validate_every)

    @property
    def batch_kind(self) -> BatchKind:
        """The kind of batches that the algorithm takes."""
        return cast(BatchKind, self.algorithm.batch_kind)
