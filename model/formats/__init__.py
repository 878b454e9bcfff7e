"""File formats of models: our checkpoints, Hugging Face folders, GGUF, PEFT adapters."""
