"""GGUF (ggml-org/ggml, docs/gguf.md): the container, the tokenizer in it, and models read from it and written to it.

`container`, `container_writer` and `tokenizer` need no JAX: `data` reads the tokenizer of a GGUF file by them.
"""
