"""One GPU: values beside this machine's CPU, the train step beside PyTorch's, decoding beside the memory's bandwidth.

    python -m benchmarks.gpu parity
    python -m benchmarks.gpu step [--form=auto] [--remat=full] [--rows=4] [--length=4096] [--unrolled]
    python -m benchmarks.gpu torch [--eager] [--rows=4] [--length=4096]      in a venv with torch and transformers
    python -m benchmarks.gpu decode [--batch 1 16 64]
    python -m benchmarks.gpu attention                  our kernels beside cudnn and the plain form: gpu_attention.py
    python -m benchmarks.gpu registers                  what Triton compiles them to, on a machine without a card

A Llama of 1.2 billion parameters in bfloat16 over float32 masters; `--small` takes one that a CPU runs in seconds. Each
part prints lines of JSON, with the device and the version of JAX, and runs with the newest JAX as with the pinned one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

LARGE = {"vocab": 128_256, "width": 2048, "layers": 16, "heads": 32, "kv": 8, "head": 64, "ffn": 8192}
SMALL = {"vocab": 512, "width": 64, "layers": 2, "heads": 4, "kv": 2, "head": 16, "ffn": 128}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--form", default="auto", help="of attention: see kernels.attention in docs/model.md")
    parser.add_argument("--remat", default="full", choices=("none", "products", "full"))
    parser.add_argument("--unrolled", action="store_true", help="layers one after the other, not in one scan")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 16, 64], help="requests decoded together")
    parser.add_argument("--eager", action="store_true", help="PyTorch without torch.compile")
    options = parser.parse_args()
    PARTS[options.part](options)


def parity(options: argparse.Namespace) -> None:
    """Loss and gradients of four kinds of model, packed rows among them, beside the CPU's in float32."""
    for name, cfg in models().items():
        for dtype in ("float32", "bfloat16"):
            say("parity", model=name, dtype=dtype, **difference(cfg, dtype))


def models() -> dict[str, Any]:
    from model import Block, ModelConfig, RMSNorm, SwiGLU, decoder
    from model.blocks.deltanet import GatedDeltaNet
    from model.blocks.mamba2 import Mamba2
    from train.presets import Mixture

    llama = decoder(512, 128, 4, 4, 2, 32, 256)
    blocks = {
        "mamba2": (Block(Mamba2(4, 64, 32), None),),
        "delta rule": (Block(GatedDeltaNet(4, 2, 64, 64), SwiGLU(256)),),
    }
    others = {name: ModelConfig(512, 128, block * 3, final_norm=RMSNorm()) for name, block in blocks.items()}
    return {"llama": llama, "moe": Mixture(ffn_width=128).put_into(llama)} | others


def difference(cfg: Any, dtype: str) -> dict[str, float]:
    """Loss here and on the CPU, and the worst and the median relative error of a parameter's gradient."""
    import jax
    import numpy as np

    from model import init
    from model.kernels import backend
    from train.algorithms import LanguageModelling, objective_of

    batch = packed_rows()
    params = init(cfg, jax.random.key(0))

    def gradient(cfg):
        objective = objective_of(LanguageModelling(), cfg)
        return jax.jit(jax.value_and_grad(lambda params, batch: objective(params, batch)[0].mean()))

    with jax.default_matmul_precision("highest"):
        loss, found = gradient(cfg.replace(dtype=dtype))(params, batch)
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu), backend.use("plain"):
        wanted_loss, wanted = gradient(cfg.replace(dtype="float32"))(*jax.device_put((params, batch), cpu))

    def error(ours, theirs) -> float:
        ours, theirs = np.float64(ours), np.float64(theirs)
        return float(np.linalg.norm(ours - theirs) / (np.linalg.norm(theirs) + 1e-30))

    errors = [error(*pair) for pair in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)]
    return {
        "loss": float(loss),
        "loss_on_cpu": float(wanted_loss),
        "worst_gradient": max(errors),
        "median_gradient": statistics.median(errors),
    }


def packed_rows(rows: int = 2) -> dict[str, Any]:
    """Two documents a row, of 120 and 80 tokens."""
    import numpy as np

    lengths = (120, 80)
    tokens = np.random.default_rng(0).integers(0, 500, (rows, sum(lengths))).astype(np.int32)
    segments = np.repeat([1, 2], lengths)[None].repeat(rows, 0).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].repeat(rows, 0).astype(np.int32)
    weights = np.ones(tokens.shape, np.float32)
    targets = np.roll(tokens, -1, 1)
    return {
        "tokens": tokens,
        "targets": targets,
        "loss_weights": weights,
        "segment_ids": segments,
        "positions": positions,
    }


def step(options: argparse.Namespace) -> None:
    import jax
    import jax.numpy as jnp

    from model import init
    from model.compilation import training_options
    from model.inspect.flops import mfu, train_flops_per_token
    from model.kernels.backend import Kernels
    from train.algorithms import LanguageModelling
    from train.optimizers import AdamW, make_optimizer
    from train.schedules import Cosine
    from train.step import make_train_step, new_state

    L, shape = sizes(options), (options.rows, options.length)
    how = {"scan": not options.unrolled, "remat": options.remat, "kernels": Kernels(attention=options.form)}
    cfg = llama(options).replace(**how)
    optimizers = {"policy": make_optimizer(AdamW(), Cosine(), 1000, cfg)}
    state = jax.jit(lambda key: new_state({"policy": init(cfg, key)}, optimizers))(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), shape, 0, L["vocab"])
    batch = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, 1),
        "loss_weights": jnp.ones(shape, jnp.float32),
        "segment_ids": jnp.ones(shape, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(options.length), shape),
    }
    take_step = make_train_step(LanguageModelling(), {"policy": cfg}, optimizers)
    train_step = lambda state, batch: take_step(state, {}, batch)
    began = time.perf_counter()
    program = (
        jax.jit(train_step, donate_argnums=0, compiler_options=training_options())
        .lower(state, batch)
        .compile()
    )
    compiled = time.perf_counter() - began

    def one() -> float:
        nonlocal state
        state, metrics = program(state, batch)
        return float(metrics["loss"].mean())

    losses = [one() for _ in range(3)]
    seconds = timed(one, 2 if options.small else 8)
    flops = tokens.size * train_flops_per_token(cfg, options.length) / seconds
    memory = jax.devices()[0].memory_stats() or {}
    say(
        "step",
        parameters=sum(x.size for x in jax.tree.leaves(state.params)),
        seconds=seconds,
        tokens_per_second=tokens.size / seconds,
        mfu=mfu(flops, 1),
        compile_seconds=compiled,
        losses=losses,
        peak_gigabytes=memory.get("peak_bytes_in_use", 0) / 1e9,
        options=vars(options),
    )


def torch(options: argparse.Namespace) -> None:
    """The same step by transformers' model with fused AdamW, bfloat16 by autocast."""
    import torch
    import transformers

    L, device = sizes(options), "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.LlamaConfig(
        vocab_size=L["vocab"], hidden_size=L["width"], intermediate_size=L["ffn"], num_hidden_layers=L["layers"],
        num_attention_heads=L["heads"], num_key_value_heads=L["kv"], head_dim=L["head"], tie_word_embeddings=True,
        max_position_embeddings=options.length, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(device).float().train()
    if options.remat == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    forward = model if options.eager else torch.compile(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=device == "cuda"
    )
    tokens = torch.randint(0, L["vocab"], (options.rows, options.length), device=device)

    def one() -> float:
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    losses = [one() for _ in range(3)]
    seconds = timed(one, 2 if options.small else 8)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    found = {
        "seconds": seconds,
        "tokens_per_second": tokens.numel() / seconds,
        "losses": losses,
        "peak_gigabytes": peak,
    }
    print(
        json.dumps({"part": "torch", "torch": torch.__version__} | found | {"options": vars(options)}),
        flush=True,
    )


def decode(options: argparse.Namespace) -> None:
    """Tokens a second of requests of 256 tokens that write 128, beside the bound that reading the weights sets."""
    import jax
    import numpy as np

    from model import init
    from serve import Engine, Request, SamplingParams

    L, new = sizes(options), 16 if options.small else 128
    cfg = llama(options).replace(param_dtype="bfloat16")
    params = jax.jit(lambda key: init(cfg, key))(jax.random.key(0))
    weight_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    for rows in options.batch:
        buckets = {"row_buckets": (rows,), "chunk_buckets": (256,), "context_buckets": (768,)}
        engine = Engine(
            cfg, params, None, max_rows=rows, max_length=768, decode_steps=32, prefill_tokens=8192, **buckets
        )
        rng, sampling = (
            np.random.default_rng(0),
            SamplingParams(max_tokens=new, temperature=1.0, ignore_eos=True),
        )
        prompts = [tuple(rng.integers(0, L["vocab"], 256).tolist()) for _ in range(rows)]
        requests = [Request(prompt=prompt, sampling=sampling, detokenize=False) for prompt in prompts]
        engine.generate(requests)  # compiles
        seconds = timed(lambda requests=requests, engine=engine: engine.generate(requests), 3)
        bound = {
            "weight_gigabytes": weight_bytes / 1e9,
            "tokens_per_terabyte_read": rows * 1e12 / weight_bytes,
        }
        say("decode", rows=rows, tokens_per_second=rows * new / seconds, seconds=seconds, **bound)


def attention(options: argparse.Namespace) -> None:
    from benchmarks import gpu_attention

    gpu_attention.attention(options, say, timed)


def registers(options: argparse.Namespace) -> None:
    from benchmarks import gpu_attention

    gpu_attention.registers(options, say)


def llama(options: argparse.Namespace) -> Any:
    from model import decoder

    L = sizes(options)
    widths = (L[name] for name in ("vocab", "width", "layers", "heads", "kv", "head", "ffn"))
    return decoder(*widths, tied_head=True, rope_theta=5e5, max_length=2048).replace(dtype="bfloat16")


def sizes(options: argparse.Namespace) -> dict[str, int]:
    return SMALL if options.small else LARGE


def timed(work: Callable[[], Any], times: int) -> float:
    """The median of the seconds that it takes."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def say(part: str, **found: Any) -> None:
    import jax

    where = {"part": part, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    print(json.dumps(where | found), flush=True)


PARTS = {
    "parity": parity,
    "step": step,
    "torch": torch,
    "decode": decode,
    "attention": attention,
    "registers": registers,
}

if __name__ == "__main__":
    main()
