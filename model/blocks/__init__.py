"""The vocabulary of blocks: each part is a small frozen dataclass with its Linen module in the same file."""
