"""Makes nf4.npz with bitsandbytes: NF4 codes, scales and what they stand for, with and without double quantization.

    .venvs/goldens/bin/python tests/goldens/make_nf4.py     (torch==2.13.0 bitsandbytes==0.50.2)

A weight is [outputs, inputs] there, in blocks of 64 inputs. Codes are unpacked, high half first.
"""

from __future__ import annotations

from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch

HERE = Path(__file__).parent


def main() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(24, 256)).astype(np.float32) * rng.lognormal(size=(24, 1)).astype(np.float32)
    weight[3, 64:128] = 0.0
    found = {"weight": weight}
    for name, double in (("plain", False), ("double", True)):
        packed, state = bnb.quantize_4bit(
            torch.tensor(weight), blocksize=64, quant_type="nf4", compress_statistics=double
        )
        codes = packed.numpy().reshape(-1)
        found[f"{name}_codes"] = np.stack([codes >> 4, codes & 15], axis=1).reshape(weight.shape)
        found[f"{name}_dense"] = bnb.dequantize_4bit(packed, state).numpy()
        if not double:
            found["scales"] = state.absmax.numpy().reshape(24, 4)
    np.savez_compressed(HERE / "nf4.npz", **found)


if __name__ == "__main__":
    main()
