"""BLT, byte-latent transformers: the entropy of the next byte ends a patch. Pagnoni et al. 2024,
arXiv:2412.09871.
"""

from __future__ import annotations

from typing import Any

from model.blocks.attention import Attention
from model.blocks.ffn import GatedMLP
from model.blocks.ngrams import NGrams
from model.blocks.patch_attention import PatchAttention, PatchPool
from model.blocks.patches import EntropyPatcher, Patcher, StaticPatcher
from model.blocks.residual import Residual
from model.config import Block, ModelConfig
from model.families.common import Family, Reader, read_activation, written_activation
from model.families.decoders import head_width, read_rms_norm
from model.families.rope import read_rope, write_rope
from model.families.tensors import Names
from model.inputs.byte_latent import ByteLatent

BLOCK: Names = {
    "input_layernorm.weight": "mixer_norm/scale",
    "post_attention_layernorm.weight": "ffn_norm/scale",
    "self_attn.q_proj.weight": "mixer/q",
    "self_attn.k_proj.weight": "mixer/k",
    "self_attn.v_proj.weight": "mixer/v",
    "self_attn.o_proj.weight": "mixer/o",
    "mlp.gate_proj.weight": "ffn/gate",
    "mlp.up_proj.weight": "ffn/up",
    "mlp.down_proj.weight": "ffn/down",
}
STACK_NAMES = {
    "patcher/": "model.patcher.layers.{i}.",
    "local_encoder/": "model.local_encoder.layers.{i}.",
    "": "model.global_transformer.layers.{i}.",
    "local_decoder/": "model.local_decoder.layers.{pair}.",  # each after a block that reads the patches
}
OUTSIDE: Names = {
    "model.patcher.embed_tokens.weight": "patcher/embedding",
    "model.patcher.norm.weight": "patcher/final_norm/scale",
    "model.patcher.lm_head.weight": "patcher/head",
    "model.local_encoder.embed_tokens.weight": "embedding",
    "model.encoder_hash_tok_embedding.weight": "ngrams/table",
    "model.local_encoder.patch_embedding_projection.weight": "pool/pooled",
    "model.global_transformer.token_embedding_projection.weight": "pool/latent",
    "model.local_decoder.patch_embedding_projection.weight": "from_latent",
    "model.local_decoder.norm.weight": "final_norm/scale",
    "lm_head.weight": "head",
}


def _cross_names(theirs: str, ours: str, q_norm: str) -> Names:
    maps: Names = {f"{theirs}.{key}_proj.weight": f"{ours}/{key}" for key in "qkvo"}
    return maps | {f"{theirs}.q_norm.weight": q_norm, f"{theirs}.k_norm.weight": f"{ours}/k_norm/scale"}


NAMES: Names = (
    OUTSIDE
    | _cross_names("model.local_encoder.cross_attn_layers.0", "pool", "pool/q_norm/scale")
    | {
        theirs + end: stack + str(ours)
        for stack, theirs in STACK_NAMES.items()
        for end, ours in BLOCK.items()
    }
)
READS_PATCHES = _cross_names(
    "model.local_decoder.cross_attn_layers.{pair}", "local_decoder/mixer", "local_decoder/mixer_norm/scale"
)

THETA = 500_000.0
PARTS = ("patcher_config", "encoder_config", "global_config", "decoder_config")
# Keys of a part that repeat another key or do not change the numbers.
DERIVED = {"max_position_embeddings", "hidden_size_global", "encoder_cross_output_size", "sliding_window"}
DERIVED |= {"vocab_size", "tie_word_embeddings", "is_encoder_decoder"}


def read(config: Reader) -> ModelConfig:
    for key in ("patch_size", "patching_batch_size", "max_position_embeddings", "rope_parameters"):
        config.get(key)  # unused by entropy patches, or used only by the parts
    patcher, encoder, latent, decoder = parts = [config.part(name) for name in PARTS]
    width, vectors = encoder.integer("hidden_size", 1024), config.integer("cross_attn_k", 2)
    latent_width = latent.integer("hidden_size", 2048)
    window = config.integer_or_none("local_attention_window_len", 512)
    decoder.must_be("hidden_size", width)
    decoder.must_be("hidden_size_global", latent_width)
    for part in (encoder, decoder):
        part.must_be("cross_attn_k", vectors)
        part.must_be("vocab_size", config.integer("vocab_size", 260))
    byte_latent = ByteLatent(
        width,
        _read_encoder(encoder, width, window),
        _read_decoder(decoder, width, window),
        _read_pool(encoder, width, vectors),
        _read_patcher(config, patcher),
        _read_ngrams(config),
        config.integer_or_none("max_patch_length", None),
    )
    block = _read_block(latent, latent_width, heads=16, ffn=5632)
    cfg = ModelConfig(
        config.integer("vocab_size", 260),
        latent_width,
        (block,) * latent.layers(default=25),
        final_norm=read_rms_norm(decoder, 1e-5),
        tied_head=config.flag("tie_word_embeddings", False),
        max_length=encoder.integer("max_position_embeddings", 24576),
        byte_latent=byte_latent,
    )
    for part in parts:
        for key in DERIVED:
            part.get(key)
    return cfg


def _read_encoder(config: Reader, width: int, window: int | None) -> tuple[Block, ...]:
    layers = config.layers(default=1)
    if config.flag("cross_attn_all_layers", False) and layers > 1:
        raise ValueError(
            f"{config.where}cross_attn_all_layers with {layers} layers is not supported: patches read the bytes after "
            "the last layer."
        )
    return (_read_block(config, width, heads=16, ffn=None, window=window),) * layers


def _read_decoder(config: Reader, width: int, window: int | None) -> tuple[Block, ...]:
    layers = config.layers(default=9)
    if not config.flag("cross_attn_all_layers", True) and layers > 1:
        raise ValueError(
            f"{config.where}cross_attn_all_layers=false with {layers} layers is not supported: every layer of the "
            "local decoder reads patches."
        )
    block = _read_block(config, width, heads=16, ffn=2816, window=window)
    mixer, norm = block.mixer, block.norm
    reads = PatchAttention(mixer.num_heads, mixer.num_kv_heads, mixer.head_dim, read_rms_norm(config, 1e-5))
    # the block that reads patches adds its input twice: itself, and as a residual
    return (Block(reads, None, norm, residual=Residual(skip_scale=2.0)), block) * layers


def _read_pool(config: Reader, width: int, vectors: int) -> PatchPool:
    heads = config.integer("num_attention_heads", 16)
    kv_heads = config.integer("num_key_value_heads", heads)
    return PatchPool(heads, kv_heads, head_width(width, heads), vectors, read_rms_norm(config, 1e-5))


def _read_patcher(config: Reader, part: Reader) -> Patcher:
    config.must_be("patching_mode", "entropy")
    threshold = config.number("patching_threshold", 1.335442066192627)
    width = part.integer("hidden_size", 768)
    window = part.integer_or_none("sliding_window", 512)
    block = _read_block(part, width, heads=12, ffn=2048, window=window, theta=10_000.0)
    part.must_be("vocab_size", config.integer("vocab_size", 260))
    blocks, norm = (block,) * part.layers(default=14), read_rms_norm(part, 1e-5)
    if not config.flag("patch_in_forward", True):
        return StaticPatcher(1)
    return EntropyPatcher(width, blocks, norm, threshold=threshold)


def _read_ngrams(config: Reader) -> NGrams:
    sizes = config.get("encoder_hash_byte_group_size") or [3, 4, 5, 6, 7, 8]
    if not isinstance(sizes, list) or not all(type(size) is int and 1 <= size <= 64 for size in sizes):
        raise ValueError(
            f"encoder_hash_byte_group_size={str(sizes)[:200]} is not a list of sizes of n-grams."
        )
    return NGrams(
        tuple(sizes),
        config.integer("encoder_hash_byte_group_vocab", 500_002),
        config.integer("encoder_hash_byte_group_nb_functions", 1),
    )


def _read_block(
    config: Reader,
    width: int,
    *,
    heads: int,
    ffn: int | None,
    window: int | None = None,
    theta: float = THETA,
) -> Block:
    """A layer of a part; `heads`, `ffn` and `theta` are defaults."""
    heads = config.integer("num_attention_heads", heads)
    head_dim = head_width(width, heads)
    config.must_be("head_dim", head_dim)
    config.must_be("attention_bias", False)
    rope = read_rope(config, head_dim, theta=theta, interleaved=True)
    mixer = Attention(heads, config.integer("num_key_value_heads", heads), head_dim, rope, window=window)
    ffn = config.integer_or_none("intermediate_size", ffn) or int(8 * width / 3)
    return Block(mixer, GatedMLP(ffn, read_activation(config)), read_rms_norm(config, 1e-5))


def write(cfg: Any) -> dict[str, Any]:
    spec = cfg.byte_latent
    byte_keys = {
        "vocab_size": cfg.vocab_size,
        "cross_attn_k": spec.pool.vectors,
        "max_position_embeddings": cfg.max_length,
    }
    decoder_keys = byte_keys | {"hidden_size_global": cfg.width}
    return {
        "cross_attn_k": spec.pool.vectors,
        "local_attention_window_len": spec.encoder[0].mixer.window,
        "max_patch_length": spec.longest_patch,
        "max_position_embeddings": cfg.max_length,
        "encoder_hash_byte_group_size": list(spec.ngrams.sizes),
        "encoder_hash_byte_group_vocab": spec.ngrams.buckets,
        "encoder_hash_byte_group_nb_functions": spec.ngrams.functions,
        "encoder_config": _write_part(spec.encoder, spec.width) | byte_keys,
        "global_config": _write_part(cfg.blocks, cfg.width),
        "decoder_config": _write_part(spec.decoder[1::2], spec.width) | decoder_keys,
    } | _write_patcher(spec.patcher, cfg.vocab_size)


def _write_patcher(patcher: Any, vocab_size: int) -> dict[str, Any]:
    if isinstance(patcher, StaticPatcher):
        return {"patch_in_forward": False}
    patcher_keys = {"vocab_size": vocab_size, "sliding_window": patcher.blocks[0].mixer.window}
    return {
        "patching_mode": "entropy",
        "patching_threshold": patcher.threshold,
        "patcher_config": _write_part(patcher.blocks, patcher.width) | patcher_keys,
    }


def _write_part(blocks: tuple[Any, ...], width: int) -> dict[str, Any]:
    mixer, ffn = blocks[0].mixer, blocks[0].ffn
    return {
        "hidden_size": width,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "intermediate_size": ffn.width,
        "hidden_act": written_activation(ffn.activation),
        "rms_norm_eps": blocks[0].norm.eps,
        **write_rope(mixer.rope),
    }


FAMILY = Family("blt", "BltForCausalLM", read, write, NAMES, mixers={PatchAttention: READS_PATCHES})
