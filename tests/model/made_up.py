"""A made-up checkpoint of a wanted size on disk, whose file is a hole: it takes no room and no time to make.

python -m tests.model.made_up FOLDER MEGABYTES [experts]
"""

import dataclasses
import json
import struct
import sys
from pathlib import Path

from model import ModelConfig, decoder
from model.blocks.ffn import GatedMLP
from model.blocks.moe import MoE
from model.families import FAMILIES
from model.families.tensors import tensor_table


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
        start, stop = stop, stop + 2 * _size(tensor.shape)
        whole |= {piece.path: 2 * _size(piece.whole) for piece in tensor.pieces}
        header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, stop]}
    whole = {
        piece.path: 2 * _size(piece.whole)
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


def _size(shape: tuple[int, ...]) -> int:
    product = 1
    for n in shape:
        product *= n
    return product


if __name__ == "__main__":
    total, largest = write_made_up(Path(sys.argv[1]), int(sys.argv[2]), "experts" in sys.argv[3:])
    print(f"{total / 1e6:.0f} MB of parameters, the largest {largest / 1e6:.1f} MB")
