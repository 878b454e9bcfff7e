"""Tokens out, fast: the engine (paged cache, continuous batching), its HTTP server and the chat page.

Everything is exported lazily, so that `import serve` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.lazy import lazy_exports

_HOME = {
    "Engine": "serve.engine",
    "EngineConfig": "serve.engine_config",
    "Grammar": "serve.request",
    "Output": "serve.request",
    "Request": "serve.request",
    "RequestError": "serve.request",
    "SamplingParams": "serve.request",
    "Thinking": "serve.request",
    "CompilationAfterWarmup": "serve.programs",
}

__all__ = [
    "CompilationAfterWarmup",
    "Engine",
    "EngineConfig",
    "Grammar",
    "Output",
    "Request",
    "RequestError",
    "SamplingParams",
    "Thinking",
]

if TYPE_CHECKING:
    from serve.engine import Engine
    from serve.engine_config import EngineConfig
    from serve.programs import CompilationAfterWarmup
    from serve.request import Grammar, Output, Request, RequestError, SamplingParams, Thinking

__getattr__, __dir__ = lazy_exports(__name__, _HOME)
