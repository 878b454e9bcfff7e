"""Shared by the kernels of recurrences: chunks of tokens, and the split of rows and heads on a mesh."""
