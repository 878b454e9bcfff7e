"""Adapters that start as a part of the map: PiSSA and OLoRA.

PEFT subtracts this part from the map W when it creates or reads an adapter: W becomes W - s b0 a0, and the adapter adds
s b a. Here W does not change, and the adapter is [a; a0] with [b, -b0].

Meng et al. 2024, arXiv:2404.02948; Büyükakyüz 2024, arXiv:2406.01775.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Factors = tuple[np.ndarray, np.ndarray]  # a0 [rank, inputs], b0 [outputs, rank]


def pissa(weight: np.ndarray, rank: int, scale: float) -> Factors:
    """The largest singular vectors of [outputs, inputs]; s b0 a0 is the best approximation of this rank."""
    u, s, vh = np.linalg.svd(weight, full_matrices=False)
    root = np.sqrt(s[:rank] / scale)
    return root[:, None] * vh[:rank], u[:, :rank] * root


def olora(weight: np.ndarray, rank: int, scale: float) -> Factors:
    """The first vectors of its QR decomposition; b0 a0 is the map's projection onto the span of its first columns."""
    q, r = np.linalg.qr(weight)
    return r[:rank], q[:, :rank]


# init_lora_weights -> the part that PEFT subtracts from the map
TAKEN_OUT: dict[str, Callable[[np.ndarray, int, float], Factors]] = {"pissa": pissa, "olora": olora}
# Inits that do not change the map.
OF_ADAPTER = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def read_init(where: str, value: Any) -> str | None:
    """The key of `TAKEN_OUT`, or None. Raises ValueError for an init with unknown changes of the base model."""
    if isinstance(value, str) and value.lower() in TAKEN_OUT:
        return value.lower()
    if any(value is plain or (isinstance(value, str) and value == plain) for plain in OF_ADAPTER):
        return None
    raise ValueError(
        f"{where}init_lora_weights={str(value)[:100]!r} is not supported: it changes the base's own weights, and the "
        "folder does not say how. Save the adapter with PEFT's save_pretrained(folder, "
        "path_initial_model_for_weight_conversion=...), which makes a plain LoRA of it."
    )


def with_taken_out(
    init: str, weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """(a [2 * rank, inputs], b [outputs, 2 * rank]), with the same result beside the whole map."""
    a0, b0 = TAKEN_OUT[init](np.asarray(weight, np.float64), a.shape[0], scale)
    if a0.shape[0] < a.shape[0]:
        raise ValueError(
            f"init_lora_weights={init!r} with r={a.shape[0]} is more than a map of {weight.shape} has."
        )
    return np.concatenate([a, a0.astype(a.dtype)]), np.concatenate([b, -b0.astype(b.dtype)], axis=1)
