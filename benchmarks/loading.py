"""What loading and converting a made-up checkpoint of 2 GB take: private memory at most, seconds, bytes read.

    python -m benchmarks.loading [--megabytes=2000]

Eight fake devices with parameters split over all of them (fsdp). Memory is that of the process without mapped files
(RssAnon), each figure from a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from model import ModelConfig, decoder
from model.blocks.ffn import GatedMLP
from model.blocks.moe import MoE
from model.families import FAMILIES
from model.families.tensors import tensor_table

HOW = {"eight devices": "mesh", "to Hugging Face": "convert", "to native": "native", "to GGUF": "gguf"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=2000)
    options = parser.parse_args()
    print(
        f"{'checkpoint':<10} {'what':<18} {'peak MB':>8} {'of parameters':>14} {'largest MB':>11} {'seconds':>8}"
    )
    for kind, experts in (("llama", False), ("mixtral", True)):
        with tempfile.TemporaryDirectory() as folder:
            total, largest = write_made_up(Path(folder) / "model", options.megabytes, experts)
            for what, how in HOW.items():
                if experts and how == "gguf":
                    continue
                target = Path(folder) / ("copy.gguf" if how == "gguf" else how)
                start = time.monotonic()
                peak = peak_memory(Path(folder) / "model", how, target)
                seconds = time.monotonic() - start
                print(
                    f"{kind:<10} {what:<18} {peak / 1e6:>8.0f} {peak / total:>14.2f} {largest / 1e6:>11.1f} "
                    f"{seconds:>8.1f}",
                    flush=True,
                )


def write_made_up(folder: Path, megabytes: int, experts: bool = False) -> tuple[int, int]:
    """A Llama or a Mixtral in bfloat16 of about so many megabytes.

    Returns:
      bytes of all parameters, and of the largest tensor or stack of experts.
    """
    width = 1024 if megabytes >= 500 else 256
    block = decoder(4096, width, 1, 8, 4, width // 8, 4 * width).blocks[0]
    if experts:
        block = dataclasses.replace(block, ffn=MoE(8, 2, GatedMLP(width)))
    maps = 3 * width**2 + (3 * 8 * width**2 + 8 * width if experts else 12 * width**2)
    layers = max(1, round(megabytes * 1e6 / (2 * maps)))
    cfg = ModelConfig(4096, width, (block,) * layers, tied_head=False, dtype="bfloat16")
    family = FAMILIES["mixtral" if experts else "llama"]
    header, whole, stop = {}, {}, 0
    for tensor in tensor_table(cfg, family.names_of(cfg)):
        start, stop = stop, stop + 2 * math.prod(tensor.shape)
        whole |= {piece.path: 2 * math.prod(piece.whole) for piece in tensor.pieces}
        header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, stop]}
    whole = {
        piece.path: 2 * math.prod(piece.whole)
        for tensor in tensor_table(cfg, family.names_of(cfg))
        for piece in tensor.pieces
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + stop)
    (folder / "config.json").write_text(json.dumps(family.write_config(cfg) | {"torch_dtype": "bfloat16"}))
    return stop, max(whole.values())


MEASURE = """
import json, sys, threading, time
import jax
jax.config.update("jax_num_cpu_devices", 8)
from model import MESH_AXES, load, load_config, logical_axes
from model.formats.convert import convert
from model.sharding import ShardingRules, named_sharding

def private():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

path, how = sys.argv[1:3]
peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, private())
        time.sleep(0.002)
if how == "mesh":
    cfg = load_config(path)
    mesh = jax.make_mesh([{"fsdp": 8}.get(axis, 1) for axis in MESH_AXES], MESH_AXES)
    shardings = jax.tree.map(lambda names: named_sharding(mesh, ShardingRules(), names), logical_axes(cfg),
                             is_leaf=lambda x: isinstance(x, tuple))
before = private()
thread = threading.Thread(target=watch); thread.start()
if how == "mesh":
    params = load(path, shardings=shardings)[1]
else:
    convert(path, sys.argv[3], format={"native": "native"}.get(how))
done = True; thread.join()
print(json.dumps((peak - before) * 1024))
"""


def peak_memory(*arguments: object) -> int:
    """Bytes of private memory that loading took at most, in a process of its own with eight devices."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(run.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
