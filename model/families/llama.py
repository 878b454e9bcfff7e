"""Llama and the families that differ from it in a bias or a norm: Mistral, Qwen2, Qwen3.

Hugging Face's config.json to `ModelConfig` and back, and the names of its tensors. Whatever would change the numbers
and is not supported is an error; a key that is absent has the default of transformers' own class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from model.blocks.attention import Attention
from model.blocks.ffn import SwiGLU
from model.blocks.norms import RMSNorm
from model.blocks.positions import Llama3Scaling, Rope
from model.config import DTYPES, Block, ModelConfig

MAX_LAYERS = 4096  # beyond this a config.json is taken for damaged

# Our parameter to Hugging Face's tensor; see `model.families.tensors`.
NAMES = {
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "final_norm/scale": "model.norm.weight",
    "mixer_norm/scale": "model.layers.{i}.input_layernorm.weight",
    "mixer/q": "model.layers.{i}.self_attn.q_proj.weight",
    "mixer/k": "model.layers.{i}.self_attn.k_proj.weight",
    "mixer/v": "model.layers.{i}.self_attn.v_proj.weight",
    "mixer/o": "model.layers.{i}.self_attn.o_proj.weight",
    "mixer/q_bias": "model.layers.{i}.self_attn.q_proj.bias",
    "mixer/k_bias": "model.layers.{i}.self_attn.k_proj.bias",
    "mixer/v_bias": "model.layers.{i}.self_attn.v_proj.bias",
    "mixer/o_bias": "model.layers.{i}.self_attn.o_proj.bias",
    "mixer/q_norm/scale": "model.layers.{i}.self_attn.q_norm.weight",
    "mixer/k_norm/scale": "model.layers.{i}.self_attn.k_norm.weight",
    "ffn_norm/scale": "model.layers.{i}.post_attention_layernorm.weight",
    "ffn/gate": "model.layers.{i}.mlp.gate_proj.weight",
    "ffn/up": "model.layers.{i}.mlp.up_proj.weight",
    "ffn/down": "model.layers.{i}.mlp.down_proj.weight",
    "ffn/gate_bias": "model.layers.{i}.mlp.gate_proj.bias",
    "ffn/up_bias": "model.layers.{i}.mlp.up_proj.bias",
    "ffn/down_bias": "model.layers.{i}.mlp.down_proj.bias",
}
HARMLESS = ("rotary_emb.inv_freq",)  # ends of tensor names that only repeat the config


@dataclasses.dataclass(frozen=True)
class LlamaFamily:
    """A row of the table: what a `model_type` fixes, and what its config.json may choose."""

    model_type: str
    architecture: str
    qkv_bias: bool | None = None  # None: `attention_bias` decides, for the output projection too
    mlp_bias: bool | None = False  # None: `mlp_bias` decides
    qk_norm: bool = False
    head_dim: int | None = None  # where config.json has none; None: hidden_size / num_attention_heads
    windowed: bool = False  # `sliding_window` holds, in all layers, unless null
    optional_window: bool = False  # `use_sliding_window` says whether, `layer_types` in which layers it holds
    even_heads: bool = False  # transformers wants hidden_size to be a multiple of num_attention_heads
    names: Mapping[str, str] = dataclasses.field(default_factory=lambda: NAMES, hash=False)
    harmless: tuple[str, ...] = HARMLESS

    def read(self, saved: Mapping[str, Any]) -> ModelConfig:
        """The model of a config.json. Raises ValueError that names the key and what is supported."""
        config = _Reader(saved)
        self._refuse_unsupported(config)
        width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
        norm = RMSNorm(config.number("rms_norm_eps", 1e-6))
        bias = config.flag("attention_bias", False) if self.qkv_bias is None else False
        mixer = Attention(
            heads,
            config.integer("num_key_value_heads", heads),
            config.integer("head_dim", self.head_dim or width // heads),
            _read_rope(config),
            qkv_bias=bias if self.qkv_bias is None else self.qkv_bias,
            out_bias=bias,
            qk_norm=norm if self.qk_norm else None,
        )
        layers = config.integer("num_hidden_layers", most=MAX_LAYERS)
        mixers = [dataclasses.replace(mixer, window=w) for w in self._read_windows(config, layers)]
        mlp_bias = config.flag("mlp_bias", False) if self.mlp_bias is None else self.mlp_bias
        ffn = SwiGLU(config.integer("intermediate_size"), mlp_bias)
        dtype = config.dtype()
        return ModelConfig(
            vocab_size=config.integer("vocab_size"),
            width=width,
            blocks=tuple(Block(mixer, ffn, norm) for mixer in mixers),
            final_norm=norm,
            tied_head=config.flag("tie_word_embeddings", False),
            max_length=config.integer("max_position_embeddings"),
            dtype=dtype,
            param_dtype=dtype,
        )

    def why_not(self, cfg: ModelConfig) -> str | None:
        """What of this model the family can't say, or None."""
        if why := why_not_uniform(cfg):
            return why
        mixer, ffn = cfg.blocks[0].mixer, cfg.blocks[0].ffn
        if (mixer.qk_norm is not None) != self.qk_norm:
            return "needs qk_norm" if self.qk_norm else "has no qk_norm"
        if self.qkv_bias is None and mixer.qkv_bias != mixer.out_bias:
            return "has one switch for the biases of queries, keys, values and output"
        if self.qkv_bias is not None and (mixer.qkv_bias, mixer.out_bias) != (self.qkv_bias, False):
            return f"has qkv_bias={self.qkv_bias} and no out_bias"
        if self.mlp_bias is not None and ffn.bias != self.mlp_bias:
            return f"has ffn bias={self.mlp_bias}"
        if self.even_heads and cfg.width % mixer.num_heads:
            return f"wants width {cfg.width} to be a multiple of num_heads {mixer.num_heads}"
        windows = {block.mixer.window for block in cfg.blocks}
        if windows != {None} and not (self.windowed or self.optional_window):
            return "has no sliding window"
        if len(windows - {None}) > 1 or (self.windowed and len(windows) > 1):
            return f"has one sliding window; this model has {sorted(w or 0 for w in windows)}"
        return None

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        """The config.json of a model for which `why_not` has nothing to say."""
        block = cfg.blocks[0]
        saved = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": cfg.vocab_size,
            "hidden_size": cfg.width,
            "intermediate_size": block.ffn.width,
            "num_hidden_layers": len(cfg.blocks),
            "num_attention_heads": block.mixer.num_heads,
            "num_key_value_heads": block.mixer.num_kv_heads,
            "head_dim": block.mixer.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": cfg.max_length,
            "rms_norm_eps": block.norm.eps,
            "tie_word_embeddings": cfg.tied_head,
            "attention_dropout": 0.0,
        } | _write_rope(block.mixer.rope)
        if self.qkv_bias is None:
            saved["attention_bias"] = block.mixer.qkv_bias
        if self.mlp_bias is None:
            saved["mlp_bias"] = block.ffn.bias
        windows = [block.mixer.window for block in cfg.blocks]
        window = next((w for w in windows if w), None)
        if self.windowed:
            saved["sliding_window"] = window
        if self.optional_window:
            kinds = ["sliding_attention" if w else "full_attention" for w in windows]
            saved |= {
                "use_sliding_window": window is not None,
                "sliding_window": window,
                "layer_types": kinds,
            }
        return saved

    def _read_windows(self, config: _Reader, layers: int) -> list[int | None]:
        """The window of each layer; None where it is as long as any text that the model takes."""
        kinds = config.saved.get("layer_types")
        if kinds is not None and (not isinstance(kinds, list) or len(kinds) != layers):
            raise ValueError(
                f"layer_types={str(kinds)[:200]} is not a list with one entry for each of {layers} layers."
            )
        if unknown := set(map(str, kinds or ())) - {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"layer_types has {unknown}; full_attention and sliding_attention are supported."
            )
        window = None
        if self.windowed and config.saved.get("sliding_window", 4096) is not None:
            window = config.integer("sliding_window", 4096)
        if self.optional_window and config.flag("use_sliding_window", False):
            window = config.integer("sliding_window", 4096)
            if kinds is None:
                first = config.saved.get("max_window_layers", 28)
                if type(first) is not int or first < 0:
                    raise ValueError(f"max_window_layers={first!r} is not a number of layers.")
                kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
        if kinds is None:
            kinds = ["sliding_attention" if window else "full_attention"] * layers
        if window is None and "sliding_attention" in kinds:
            raise ValueError("layer_types has sliding_attention, but no sliding_window is set and used.")
        if window is not None and window >= config.integer("max_position_embeddings"):
            window = None
        return [window if kind == "sliding_attention" else None for kind in kinds]

    def _refuse_unsupported(self, config: _Reader) -> None:
        config.must_be("hidden_act", "silu")
        config.must_be("pretraining_tp", 1)
        config.must_be("partial_rotary_factor", 1)
        config.must_be("quantization_config", None)
        config.must_be("is_encoder_decoder", False)
        for key, of_family in (("attention_bias", self.qkv_bias), ("mlp_bias", self.mlp_bias)):
            if of_family is not None:
                config.must_be(key, False)


def why_not_uniform(cfg: ModelConfig) -> str | None:
    """What keeps a config out of a format with one width, one head count and one eps for all, or None."""
    if cfg.heads:
        return f"has no place for the heads {', '.join(head.name for head in cfg.heads)}"
    if len({_without_window(block) for block in cfg.blocks}) > 1:
        return "has one kind of block; this model has several"
    block = cfg.blocks[0]
    norms = {block.norm, cfg.final_norm} | ({block.mixer.qk_norm} if block.mixer.qk_norm else set())
    if len(norms) > 1:
        return f"has one rms_norm_eps; this model has {sorted(norm.eps for norm in norms)}"
    return None


def _without_window(block: Block) -> Block:
    return dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, window=None))


def _read_rope(config: _Reader) -> Rope:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    saved = config.saved
    parameters = saved.get("rope_parameters") or saved.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"rope_parameters={parameters!r} is not an object.")
    rope = _Reader(parameters, "rope_parameters.")
    theta = rope.number("rope_theta", config.number("rope_theta", 10_000.0))
    if "rope_theta" in saved and config.number("rope_theta") != theta:
        raise ValueError(
            f"rope_theta={saved['rope_theta']} disagrees with rope_parameters.rope_theta={theta}."
        )
    rope.must_be("partial_rotary_factor", 1)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        nested = [key for key, value in parameters.items() if isinstance(value, dict)]
        if nested:
            raise ValueError(
                f"rope_parameters has a part for each kind of layer ({nested}); one for all is supported."
            )
        return Rope(theta)
    if kind != "llama3":
        raise ValueError(f"rope_type={kind!r} is not supported; 'default' and 'llama3' are.")
    scaling = Llama3Scaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_length=rope.integer("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ValueError(
            f"rope_parameters.high_freq_factor must be above low_freq_factor; given {parameters}."
        )
    return Rope(theta, scaling)


def _write_rope(rope: Rope) -> dict[str, Any]:
    """In the form that transformers 4 and 5 both read."""
    scaling = rope.scaling
    if scaling is None:
        return {"rope_theta": rope.theta, "rope_scaling": None}
    saved = {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_length,
    }
    return {"rope_theta": rope.theta, "rope_scaling": saved}


class _Reader:
    """Keys of a JSON object, each of the wanted type and within reason; null means absent."""

    def __init__(self, saved: Mapping[str, Any], where: str = ""):
        self.saved, self.where = saved, where

    def value(self, key: str, default: Any) -> Any:
        value = self.saved.get(key)
        if value is None and default is None:
            raise ValueError(f"{self.where}{key} is missing.")
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        value = self.value(key, default)
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{self.where}{key}={value!r} is not an integer from 1 to {most}.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.value(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise ValueError(f"{self.where}{key}={value!r} is not a positive number.")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.value(key, default)
        if type(value) is not bool:
            raise ValueError(f"{self.where}{key}={value!r} is neither true nor false.")
        return value

    def dtype(self) -> str:
        name = self.saved.get("dtype") or self.saved.get("torch_dtype") or "float32"
        name = str(name).removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"dtype={name!r} is not one of {', '.join(DTYPES)}.")
        return name

    def must_be(self, key: str, wanted: Any) -> None:
        value = self.saved.get(key)
        if value is not None and value != wanted:
            raise ValueError(f"{self.where}{key}={str(value)[:200]!r} is not supported; only {wanted!r} is.")


LLAMA = LlamaFamily("llama", "LlamaForCausalLM", mlp_bias=None, even_heads=True)
MISTRAL = LlamaFamily("mistral", "MistralForCausalLM", qkv_bias=False, windowed=True)
QWEN2 = LlamaFamily("qwen2", "Qwen2ForCausalLM", qkv_bias=True, optional_window=True)
QWEN3 = LlamaFamily("qwen3", "Qwen3ForCausalLM", qk_norm=True, head_dim=128, optional_window=True)
