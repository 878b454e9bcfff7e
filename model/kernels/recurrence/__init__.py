"""What the kernels of recurrences share: chunks of tokens, and how rows and heads are split on a mesh."""
