"""A model family maps config.json to `ModelConfig` and back, and names the tensors.

An unsupported key that would change the numbers is an error. An absent key has the default of its config class in
transformers (as of 5.23).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from model.blocks.attention import Attention
from model.blocks.moe import MoE
from model.config import DTYPES, ModelConfig
from model.families.foreign import NEUTRAL, changes_numbers
from model.families.tensors import Names, NamesOf
from model.formats import fp8

MAX_LAYERS = 4096  # a config.json with more is damaged

# Keys of a config.json that do not change the numbers of inference.
IGNORED_KEYS = frozenset(
    """
    architectures auto_map dtype torch_dtype model_type transformers_version _name_or_path name_or_path use_cache
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id unk_token_id decoder_start_token_id
    initializer_range initializer_factor init_std id2label label2id num_labels problem_type return_dict
    output_attentions output_hidden_states output_router_logits chunk_size_feed_forward finetuning_task
    task_specific_params tokenizer_class prefix torchscript use_bfloat16 remove_invalid_values attn_implementation
    _attn_implementation attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop
    residual_dropout embedding_dropout attn_dropout emb_pdrop
    resid_dropout emb_dropout hidden_dropout_prob attention_probs_dropout_prob classifier_dropout dropout dropout_rate
    ffn_dropout mlp_dropout router_aux_loss_coef router_z_loss_coef router_jitter_noise is_decoder
    """.split()
)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`. `write` takes any model; reading its result again shows what it cannot express."""

    model_type: str
    architecture: str
    read: Callable[[Reader], ModelConfig]
    write: Callable[[Any], dict[str, Any]]
    names: Names | Callable[[ModelConfig], Names]
    # more names for blocks with this mixer
    mixers: Mapping[type, Names] = dataclasses.field(default_factory=dict)
    packed: tuple[str, ...] = ()  # quant_method of transformers that can be read beside fp8
    blocks_per_layer: int = 1  # our blocks in one layer of the checkpoint
    ignored_tensors: tuple[str, ...] = ()  # suffixes of tensors that are copies, or belong to another head
    encoder_decoder: bool = False
    causal: bool = True  # the default of is_causal
    # alias of a key -> the key that `read` uses: transformers' attribute_map
    key_aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # other names of a stored tensor, in older or partial checkpoints, best first
    tensor_aliases: Callable[[str], tuple[str, ...]] = lambda name: ()

    def read_config(self, saved: Mapping[str, Any]) -> ModelConfig:
        """The model of a config.json. Raises ValueError that names the key and what is supported."""
        config = Reader(self._without_aliases(saved))
        self._check_quantization(config)
        config.must_be("is_encoder_decoder", self.encoder_decoder)
        config.must_be("add_cross_attention", False)
        cfg = self.read(config)
        if config.flag("is_causal", self.causal) != self.causal:
            cfg = _bidirectional(cfg)
        dtype = config.dtype()
        self._check_unread(config)
        return cfg.replace(dtype=dtype, param_dtype=dtype, family=self.model_type)

    def _without_aliases(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The config with aliases replaced by the keys that `read` uses."""
        found = dict(saved)
        for alias, key in self.key_aliases.items():
            value = found.pop(alias, None)
            if found.get(key) is None and value is not None:
                found[key] = value
            elif value is not None and found[key] != value:
                raise ValueError(f"{key} and {alias} mean the same, and disagree.")
        return found

    def _check_unread(self, config: Reader) -> None:
        """Raises ValueError for an unread key that changes numbers in another family; logs other unknown keys."""
        unknown = []
        for where, key, value in config.unread():
            if key in IGNORED_KEYS or value is None:
                continue
            if changes_numbers(key, value, config.saved):
                raise ValueError(
                    f"{where}{key}={str(value)[:200]} is not supported: {self.model_type} has no such key, and other "
                    "families compute something else with it. If this model was trained without it, remove it from "
                    "config.json."
                )
            if key not in NEUTRAL:
                unknown.append(f"{where}{key}")
        if unknown:
            _log.warning(
                "config.json has keys that %s does not know; ignored: %s",
                self.model_type,
                ", ".join(sorted(unknown)),
            )

    def _check_quantization(self, config: Reader) -> None:
        quantization = config.get("quantization_config")
        method = Reader(quantization).get("quant_method") if isinstance(quantization, dict) else None
        packed = ("fp8", *self.packed)
        if quantization and method not in packed:
            raise ValueError(
                f"quantization_config with quant_method={str(method)[:100]!r} is not supported; {' and '.join(packed)} "
                "can be read."
            )
        fp8.block_of(quantization)

    def names_of(self, cfg: ModelConfig) -> NamesOf:
        names = self.names(cfg) if callable(self.names) else self.names
        return lambda block: names | self.mixers.get(type(block.mixer), {}) if block else names

    def why_not(self, cfg: ModelConfig) -> str | None:
        """What the family cannot express of this model, or None."""
        try:
            again = self.read_config(self.write_config(cfg))
        except AttributeError as error:
            return f"has other parts ({error})"
        except (TypeError, ValueError, LookupError, StopIteration) as error:
            return f"can't express it ({error})"
        return difference(cfg, again)

    def write_config(self, cfg: ModelConfig) -> dict[str, Any]:
        """The config.json of a model that the family can express (see `why_not`)."""
        saved = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": cfg.vocab_size,
            "tie_word_embeddings": cfg.tied_head,
        }
        if self.causal and not cfg.causal:
            saved["is_causal"] = False
        return saved | self.write(cfg)


def _bidirectional(cfg: ModelConfig) -> ModelConfig:
    """The decoder with attention to the whole text: an embedding model.

    Raises ValueError for models where the effect of `is_causal` in transformers is not known.
    """
    plain = cfg.encoder is None and cfg.byte_latent is None and cfg.mtp is None
    for block in cfg.blocks:
        mixer = block.mixer
        plain = plain and isinstance(mixer, Attention) and mixer.causal and not (mixer.window or mixer.chunk)
    if not plain:
        raise ValueError(
            "is_causal may differ from this family's default only if every layer is attention to the whole text."
        )
    whole = {
        mixer: dataclasses.replace(mixer, causal=False) for mixer in {block.mixer for block in cfg.blocks}
    }
    return cfg.replace(
        blocks=tuple(dataclasses.replace(block, mixer=whole[block.mixer]) for block in cfg.blocks)
    )


# Fields that a format may leave out: how the function runs or is trained, not what it computes.
FREE: dict[type, tuple[str, ...]] = {
    ModelConfig: ("scan", "dtype", "param_dtype", "remat", "kernels", "family"),
    MoE: ("balance_loss", "z_loss", "balance_rate", "dispatch", "capacity_factor"),
}


def difference(ours: Any, theirs: Any, where: str = "") -> str | None:
    """The first difference between a model and what a format expresses, as a sentence without its subject."""
    free = FREE.get(type(ours), ())
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        names = [field.name for field in dataclasses.fields(ours) if field.name not in free]
        parts: list[tuple[str, Any, Any]] = [
            (f"{where}.{name}".lstrip("."), getattr(ours, name), getattr(theirs, name)) for name in names
        ]
    elif isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        parts = [(f"{where}[{i}]", *pair) for i, pair in enumerate(zip(ours, theirs, strict=True))]
    else:
        return None if ours == theirs else f"would have {where}={theirs!r} where this model has {ours!r}"
    return next((found for name, one, other in parts if (found := difference(one, other, name))), None)


class Reader:
    """Reads keys of a JSON object with checks of type and range; null means absent.

    It records the keys that were read, so that unread ones can be reported.
    """

    def __init__(self, saved: Mapping[str, Any], where: str = ""):
        self.saved, self.where = saved, where
        self._read: set[str] = set()
        self._parts: dict[str, Reader] = {}

    def unread(self) -> list[tuple[str, str, Any]]:
        """(prefix, key, value) of each unread key, also in nested objects."""
        found = [(self.where, key, self.saved[key]) for key in self.saved.keys() - self._read]
        return found + [key for part in self._parts.values() for key in part.unread()]

    def get(self, key: str, default: Any = None) -> Any:
        """The value, unchecked."""
        self._read.add(key)
        return self.saved.get(key, default)

    def value(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None and default is None:
            raise ValueError(f"{self.where}{key} is missing.")
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, most: int = 2**31 - 1, least: int = 1) -> int:
        value = self.value(key, default)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{self.where}{key}={value!r} is not an integer from {least} to {most}.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.value(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise ValueError(f"{self.where}{key}={value!r} is not a positive number.")
        return float(value)

    def number_or_none(self, key: str, default: float | None) -> float | None:
        """A key with a meaning for null."""
        value = self.get(key, default)
        return None if value is None else self.number(key, default)

    def integer_or_none(self, key: str, default: int | None) -> int | None:
        """A key with a meaning for null."""
        value = self.get(key, default)
        return None if value is None else self.integer(key, default)

    def alias(self, key: str, *others: str) -> str:
        """The one of these names that the config has; the first if it has none."""
        found = [name for name in (key, *others) if self.get(name) is not None]
        if any(self.saved[name] != self.saved[found[0]] for name in found):
            raise ValueError(
                f"{' and '.join(self.where + name for name in found)} mean the same, and disagree."
            )
        return found[0] if found else key

    def flag(self, key: str, default: bool) -> bool:
        value = self.value(key, default)
        if type(value) is not bool:
            raise ValueError(f"{self.where}{key}={value!r} is neither true nor false.")
        return value

    def choice(self, key: str, names: Mapping[str, str], default: str) -> str:
        """The translation of a known word."""
        value = self.value(key, default)
        if not isinstance(value, str) or value not in names:
            raise ValueError(
                f"{self.where}{key}={str(value)[:200]!r} is not supported; {' and '.join(map(repr, names))} "
                f"{'is' if len(names) == 1 else 'are'}."
            )
        return names[value]

    def part(self, key: str) -> Reader:
        """A nested object, {} if absent."""
        value = self.get(key) or {}
        if not isinstance(value, dict):
            raise ValueError(f"{self.where}{key}={str(value)[:200]} is not an object.")
        return self._parts.setdefault(key, Reader(value, f"{self.where}{key}."))

    def layers(self, key: str = "num_hidden_layers", default: int | None = None) -> int:
        return self.integer(key, default, most=MAX_LAYERS)

    def layer_kinds(self, layers: int, known: tuple[str, ...], default: list[str]) -> list[str]:
        """`layer_types`, checked."""
        kinds = self.get("layer_types")
        if kinds is None:
            return default
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise ValueError(
                f"{self.where}layer_types={str(kinds)[:200]} is not a list with one entry for each of {layers} layers."
            )
        if unknown := set(map(str, kinds)) - set(known):
            raise ValueError(f"{self.where}layer_types has {unknown}; {' and '.join(known)} are supported.")
        return kinds

    def dtype(self) -> str:
        name = self.get("dtype") or self.get("torch_dtype") or "float32"
        name = str(name).removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"dtype={name!r} is not one of {', '.join(DTYPES)}.")
        return name

    def must_be(self, key: str, *wanted: Any) -> None:
        value = self.get(key)
        if value is not None and value not in wanted:
            supported = " or ".join(repr(one) for one in wanted)
            raise ValueError(f"{self.where}{key}={str(value)[:200]!r} is not supported; only {supported} is.")


# transformers' names of activations -> ours; a model is saved with the first name of its activation.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "tanh": "tanh",
}


SILU = tuple(theirs for theirs, ours in ACTIVATIONS.items() if ours == "silu")
GELU_TANH = tuple(theirs for theirs, ours in ACTIVATIONS.items() if ours == "gelu_tanh")


def read_activation(config: Reader, key: str = "hidden_act", default: str = "silu") -> str:
    return config.choice(key, ACTIVATIONS, default)


@functools.cache
def written_activation(name: str, prefer: str | None = None) -> str:
    """transformers' name of an activation; `prefer` if it means the same."""
    if prefer is not None and ACTIVATIONS.get(prefer) == name:
        return prefer
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == name)
