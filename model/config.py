"""ModelConfig: a model is a list of blocks, frozen and hashable, readable and writable as JSON."""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any

import jax.numpy as jnp

from model.blocks.attention import Attention, Temperature
from model.blocks.block import Block
from model.blocks.cross_attention import CrossAttention
from model.blocks.deltanet import GatedDeltaNet, KimiDeltaAttention
from model.blocks.differential_attention import DifferentialAttention
from model.blocks.experts import ClampedSwiGLU
from model.blocks.ffn import MLP, GatedMLP, SwiGLU
from model.blocks.heads import Transform
from model.blocks.latent_attention import LatentAttention
from model.blocks.lora import LoRA
from model.blocks.mamba import Mamba
from model.blocks.mamba2 import Mamba2
from model.blocks.mixture_of_depths import MixtureOfDepths
from model.blocks.mixture_of_recursions import (
    MixtureOfRecursions,
    RecursionExpertChoice,
    RecursionTokenChoice,
)
from model.blocks.moe import MoE
from model.blocks.ngrams import NGrams
from model.blocks.norms import LayerNorm, Norm, RMSNorm
from model.blocks.parallel import Parallel
from model.blocks.patch_attention import PatchAttention, PatchPool
from model.blocks.patches import EntropyPatcher, SpacePatcher, StaticPatcher
from model.blocks.positions import (
    Alibi,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NTKScaling,
    RelativeBias,
    Rope,
    SinusoidalPositions,
    YarnScaling,
)
from model.blocks.remat import check_remat
from model.blocks.residual import HyperConnections, ParallelResidual, Residual
from model.blocks.retnet import Retention
from model.blocks.rglru import RGLRU
from model.blocks.router import ExpertChoice, Router, SparseMixer
from model.blocks.rwkv7 import RWKV7, RWKV7ChannelMix
from model.config_versions import upgraded
from model.inputs.byte_latent import ByteLatent
from model.inputs.encoder import Encoder
from model.kernels.backend import Kernels
from model.readouts.heads import ClassHead, LinearHead, ScalarHead
from model.readouts.mtp import MTP, ParallelMTP, SequentialMTP
from model.stacks import Run, Stack

# The parts that a saved config may name. Add a new part here.
PARTS = {
    cls.__name__: cls
    for cls in (
        *(Attention, CrossAttention, Temperature, LatentAttention, DifferentialAttention),
        *(Mamba, Mamba2, GatedDeltaNet, KimiDeltaAttention, Retention, RGLRU, RWKV7, RWKV7ChannelMix),
        *(Parallel, MixtureOfDepths, MixtureOfRecursions, RecursionExpertChoice, RecursionTokenChoice),
        *(GatedMLP, MLP),
        *(Residual, ParallelResidual, HyperConnections),
        *(MoE, ClampedSwiGLU, Router, SparseMixer, ExpertChoice),
        *(RMSNorm, LayerNorm, Transform),
        *(Rope, LinearScaling, NTKScaling, Llama3Scaling, YarnScaling, LongRopeScaling),
        LoRA,
        *(Alibi, RelativeBias, LearnedPositions, SinusoidalPositions),
        *(SequentialMTP, ParallelMTP),
        *(PatchAttention, PatchPool, EntropyPatcher, SpacePatcher, StaticPatcher, NGrams),
    )
}

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that defines the model's function.

    `scan`, `remat`, `kernels` and `dtype` change how it runs, not what it computes.
    """

    vocab_size: int
    width: int
    blocks: tuple[Block, ...]
    final_norm: Norm | None = RMSNorm()
    tied_head: bool = True  # logits through the transposed embedding
    head_bias: bool = False
    positions: LearnedPositions | SinusoidalPositions | None = None  # added to the embedding
    token_types: int = 0  # kinds of tokens (BERT's sentences A and B); each adds a vector to the embedding
    embed_norm: Norm | None = None  # norm of the embedding, before the first block
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None  # logits stay within +-logit_softcap
    head_transform: Transform | None = None  # applied to the hidden state before the logits (BERT)
    pooler: Transform | None = None  # applied to the hidden state: `out.pooled`
    heads: tuple[Any, ...] = ()  # each a `Readout` of model.readouts.heads: `out.heads`
    media: tuple[Any, ...] = ()  # each a `MediaInput` of model.inputs.media: images, audio and so on
    max_length: int = 2048  # tokens of the longest supported context
    dtype: str = "float32"  # of activations
    param_dtype: str = "float32"  # of new parameters
    scan: bool = False  # one lax.scan over equal neighbouring blocks: compiles faster, runs slower on CPUs
    kernels: Kernels = Kernels()  # the implementation of each operation; "auto": the platform's
    # which activations of a block are saved for the backward pass: see model.blocks.remat
    remat: str = "none"
    encoder: Encoder | None = None
    # Hugging Face's model_type of the loaded checkpoint; `save` uses this family if it can express the model
    family: str | None = dataclasses.field(default=None, compare=False)
    adapters: LoRA | None = None  # low-rank adapters of the blocks' linear maps
    mtp: MTP | None = None  # multi-token prediction: `out.mtp_logits`
    # `blocks` then run on patches of bytes, and `width` is a patch's width
    byte_latent: ByteLatent | None = None

    def __post_init__(self):
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(DTYPES)}.")
        check_remat(self.remat)
        _check_given(self, "ModelConfig")
        self._check_encoder()
        self._check_patches()
        if self.mtp is not None and not self.causal:
            raise ValueError(
                "mtp: an encoder sees the tokens that multi-token prediction would predict. Use mtp=None."
            )
        _ = self.stacks  # raises for blocks without a common residual stream
        if isinstance(self.mtp, ParallelMTP):
            Stack("", (*self.blocks, *self.mtp.blocks))  # the heads read the stream of the model's last block
        if self.pooler is None and any(isinstance(head, ClassHead) and head.pooled for head in self.heads):
            raise ValueError("a pooled head needs a pooler, and this model has none.")
        if not self.blocks or self.vocab_size < 1 or self.width < 1:
            raise ValueError(
                f"a model needs at least one block, token and channel; given {len(self.blocks)} blocks, "
                f"vocab_size={self.vocab_size}, width={self.width}."
            )

    def _check_encoder(self) -> None:
        crossing = [block.cross is not None for block in self.blocks]
        if self.encoder is None and any(crossing):
            raise ValueError("blocks with cross attention need an encoder, and this model has none.")
        if self.encoder is not None and (self.positions or self.token_types or self.embed_norm):
            raise ValueError(
                "an encoder-decoder has no positions, token types or norm at its embedding: use rope or biases."
            )

    def _check_patches(self) -> None:
        if any(isinstance(block.mixer, PatchAttention) for block in self.blocks):
            raise ValueError(
                "PatchAttention belongs in the local decoder of `byte_latent`, not in the model's own blocks."
            )
        if self.byte_latent is None:
            return
        if self.encoder is not None or self.mtp is not None:
            raise ValueError("a byte-latent model can have neither an encoder nor multi-token prediction.")
        if not self.causal:
            raise ValueError("every block of a byte-latent model must be causal.")

    @property
    def causal(self) -> bool:
        """Whether no token attends to later tokens, so that the model can generate text."""
        stacks = [stack for stack in self.stacks if stack.name != "encoder"]
        return all(_is_causal(block.mixer) for stack in stacks for block in stack.blocks)

    @property
    def token_width(self) -> int:
        """Width of the embedding and of the last hidden state."""
        return self.width if self.byte_latent is None else self.byte_latent.width

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """All stacks of blocks in the order of the computation; the main stack has the name ""."""
        own = Stack("", self.blocks, last_apart=isinstance(self.mtp, ParallelMTP))
        encoder = () if self.encoder is None else (self.encoder.stack,)
        before = () if self.byte_latent is None else self.byte_latent.before
        after = () if self.byte_latent is None else self.byte_latent.after
        return *encoder, *before, own, *after

    def stack(self, name: str = "") -> Stack:
        """The stack of this name, by default the main one. Raises KeyError for an unknown name."""
        return {stack.name: stack for stack in self.stacks}[name]

    def runs(self, stack: str = "") -> list[Run]:
        """The parameter groups of a stack: name, block, layer numbers. With `scan`, equal neighbours form one group."""
        return self.stack(stack).runs(self.scan)

    def replace(self, **changes) -> ModelConfig:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON; each part has its class name under "kind"."""
        return _to_jsonable(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`. Raises ValueError that names an unknown part or field."""
        config = _from_jsonable(saved)
        if not isinstance(config, cls):
            raise ValueError(f"a saved model config has kind ModelConfig; this one is {saved.get('kind')!r}.")
        return config


def decoder(
    vocab_size: int,
    width: int,
    layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    ffn_width: int,
    *,
    rope_theta: float = 10_000.0,
    qk_norm: bool = False,
    norm_eps: float = 1e-5,
    **model,
) -> ModelConfig:
    """A Llama-like decoder of `layers` equal blocks; `model` sets further fields of `ModelConfig`."""
    norm = RMSNorm(norm_eps)
    mixer = Attention(num_heads, num_kv_heads, head_dim, Rope(rope_theta), qk_norm=norm if qk_norm else None)
    block = Block(mixer, SwiGLU(ffn_width), norm)
    return ModelConfig(vocab_size, width, (block,) * layers, final_norm=norm, **model)


def dtype_of(name: str) -> jnp.dtype:
    return jnp.dtype(name)


def _to_jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {f.name: _to_jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [_to_jsonable(v) for v in value]
    return value


def _from_jsonable(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_jsonable(v) for v in value)
    if not isinstance(value, dict):
        return value
    value = upgraded(value)
    kinds = PARTS | {
        cls.__name__: cls
        for cls in (ModelConfig, Block, Encoder, ByteLatent, ScalarHead, LinearHead, ClassHead, Kernels)
    }
    cls = kinds.get(str(value.get("kind")))
    if cls is None:
        raise ValueError(
            f"unknown model part {value.get('kind')!r}. Known parts: {', '.join(sorted(kinds))}."
        )
    unknown = set(value) - {"kind"} - {f.name for f in dataclasses.fields(cls)}
    if unknown:
        raise ValueError(
            f"{cls.__name__} has no field {sorted(unknown)}; the file was written by another version."
        )
    return cls(**{k: _from_jsonable(v) for k, v in value.items() if k != "kind"})


def _is_causal(mixer: Any) -> bool:
    """Whether a mixer, and all mixers within it, are causal."""
    within = [*getattr(mixer, "mixers", ()), *(block.mixer for block in getattr(mixer, "blocks", ()))]
    return getattr(mixer, "causal", True) and all(map(_is_causal, within))


def _check_given(part: Any, where: str) -> None:
    """Raises ValueError if a field, at any depth, is None without allowing it."""
    if isinstance(part, tuple):
        for i, each in enumerate(part):
            _check_given(each, f"{where}[{i}]")
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        return
    for name, allowed in _allows_none(type(part)).items():
        value = getattr(part, name)
        if value is None and not allowed:
            raise ValueError(f"{where}.{name} is None, and a {type(part).__name__} needs it.")
        _check_given(value, f"{where}.{name}")


@functools.cache
def _allows_none(cls: type) -> dict[str, bool]:
    """Whether each field of a dataclass may be None, by its annotation."""
    hints = typing.get_type_hints(cls)
    may = lambda hint: hint in (Any, None, type(None)) or type(None) in typing.get_args(hint)
    return {field.name: may(hints[field.name]) for field in dataclasses.fields(cls)}
