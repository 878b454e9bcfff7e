"""Makes embedder/: a tiny Qwen3 laid out as Qwen3-Embedding is, and the vectors that sentence-transformers gives texts.

    .venvs/goldens/bin/pip install --no-deps sentence-transformers==5.2.0 scikit-learn scipy joblib threadpoolctl \
        cloudpickle loky narwhals   (into the environment of make.py)
    .venvs/goldens/bin/python tests/goldens/make_embedder.py

The tokenizer appends <|endoftext|>, whose state is the vector; the other vectors are those of other poolings.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from sentence_transformers import SentenceTransformer
from tokenizers import decoders, models, pre_tokenizers, processors

OUT = Path(__file__).parent / "embedder"
END = "<|endoftext|>"
TEXTS = ["The cat sits.", "A kitten is on the rug; it sleeps.", "Größe", "x", "a b c d e f g h"]
POOLINGS = ("lasttoken", "cls_token", "mean_tokens")


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("Ġ", "a")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *map("".join, merges)])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END])
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, backend.token_to_id(END))]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=END, padding_side="right"
    )
    tokenizer.save_pretrained(OUT)
    config = transformers.Qwen3Config(
        vocab_size=len(vocabulary) + 1, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=512,
        tie_word_embeddings=True, use_cache=True, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).float().save_pretrained(OUT)
    (OUT / "generation_config.json").unlink()
    names = {0: ("", "Transformer"), 1: ("1_Pooling", "Pooling"), 2: ("2_Normalize", "Normalize")}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in names.items()
    ]
    (OUT / "modules.json").write_text(json.dumps(modules, indent=1) + "\n")
    (OUT / "1_Pooling").mkdir()
    vectors = {}
    for pooling in reversed(POOLINGS):  # the last one stays in the folder
        keys = {f"pooling_mode_{each}": each == pooling for each in POOLINGS}
        text = json.dumps({"word_embedding_dimension": 16, **keys, "include_prompt": True}, indent=1)
        (OUT / "1_Pooling" / "config.json").write_text(text + "\n")
        vectors[pooling] = SentenceTransformer(str(OUT), device="cpu").encode(TEXTS)
    np.savez_compressed(OUT / "vectors.npz", texts=np.array(TEXTS), **vectors)


if __name__ == "__main__":
    main()
