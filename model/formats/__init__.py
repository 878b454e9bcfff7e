"""Files that models are read from and written to: our checkpoints, Hugging Face folders, GGUF, PEFT adapters."""
