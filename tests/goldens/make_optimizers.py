"""Makes optimizers.npz: parameters after each of three steps of torch's own optimizers and of the papers' code.

    .venvs/goldens/bin/python tests/goldens/make_optimizers.py     (torch==2.13.0 lion-pytorch==0.2.4)

AdamW, Adafactor and Muon are those of `torch.optim`; Lion is the package of its paper's authors' algorithm. Torch's
Adafactor multiplies the learning rate by the root mean square of the parameter, so that is divided out: its entry is
the update. Muon's iterations are in bfloat16 there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from lion_pytorch import Lion

STEPS, LR = 3, 0.02
HERE = Path(__file__).parent


def main() -> None:
    rng = np.random.default_rng(0)
    start = rng.normal(size=(12, 8)).astype(np.float32)
    grads = rng.normal(size=(STEPS, 12, 8)).astype(np.float32)
    found = {"start": start, "grads": grads}
    found["adamw"] = run(lambda p: torch.optim.AdamW(p, LR, (0.9, 0.95), 1e-8, 0.1), start, grads)
    found["lion"] = run(lambda p: Lion(p, LR, (0.9, 0.99), 0.5), start, grads)
    muon = lambda p: torch.optim.Muon(p, LR, 0.1, 0.95, True, adjust_lr_fn="match_rms_adamw")
    found["muon"] = run(muon, start, grads)
    adafactor = lambda p: torch.optim.Adafactor(p, LR, eps=(1e-30, 1e-3), weight_decay=0.0)
    after = run(adafactor, start, grads)
    before = np.concatenate([start[None], after[:-1]])
    rms = np.sqrt((before**2).mean(axis=(1, 2), keepdims=True))
    found["adafactor_update"] = (after - before) / (LR * rms)
    np.savez_compressed(HERE / "optimizers.npz", **found)


def run(make, start: np.ndarray, grads: np.ndarray) -> np.ndarray:
    param = torch.nn.Parameter(torch.tensor(start))
    optimizer, found = make([param]), []
    for grad in grads:
        param.grad = torch.tensor(grad)
        optimizer.step()
        found.append(param.detach().numpy().copy())
    return np.stack(found)


if __name__ == "__main__":
    main()
