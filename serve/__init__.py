"""Tokens out, fast: the engine (paged cache, continuous batching), its HTTP server and the chat page.

Everything is exported lazily, so that `import serve` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_HOME = {
    "Engine": "serve.engine",
    "EngineConfig": "serve.engine_config",
    "Output": "serve.request",
    "Request": "serve.request",
    "RequestError": "serve.request",
    "SamplingParams": "serve.request",
    "CompilationAfterWarmup": "serve.programs",
}

__all__ = [
    "CompilationAfterWarmup",
    "Engine",
    "EngineConfig",
    "Output",
    "Request",
    "RequestError",
    "SamplingParams",
]

if TYPE_CHECKING:
    from serve.engine import Engine
    from serve.engine_config import EngineConfig
    from serve.programs import CompilationAfterWarmup
    from serve.request import Output, Request, RequestError, SamplingParams


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'serve' has no attribute {name!r}; it exports {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return __all__
