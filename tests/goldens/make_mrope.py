"""Rotary positions of several axes as transformers has them.

Run it with `.venvs/goldens/bin/python tests/goldens/make_mrope.py`. Qwen2-VL gives each axis a block of frequencies,
Qwen3-VL lets the axes take turns. `mrope.npz` has positions [3, B, T], vectors [B, H, T, C] and their rotated forms.
"""

from pathlib import Path

import numpy as np
import torch
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding, rotate_half
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

SECTIONS = [3, 3, 2]


def main():
    rng = np.random.default_rng(0)
    positions = rng.integers(0, 40, (3, 2, 7))
    x = rng.normal(size=(2, 2, 7, 16)).astype(np.float32)
    found = {"positions": positions, "x": x, "sections": SECTIONS}
    kinds = {
        "qwen2_vl": (Qwen2VLTextConfig, Qwen2VLRotaryEmbedding),
        "qwen3_vl": (Qwen3VLTextConfig, Qwen3VLTextRotaryEmbedding),
    }
    for name, (config_class, rotary_class) in kinds.items():
        rope = {"rope_type": "default", "rope_theta": 500.0, "mrope_section": SECTIONS}
        config = config_class(hidden_size=32, num_attention_heads=2, head_dim=16, rope_parameters=rope)
        cos, sin = rotary_class(config)(torch.tensor(x), torch.tensor(positions))
        vectors = torch.tensor(x)
        found[name] = (vectors * cos[:, None] + rotate_half(vectors) * sin[:, None]).numpy()
    np.savez(Path(__file__).with_name("mrope.npz"), **found)


if __name__ == "__main__":
    main()
