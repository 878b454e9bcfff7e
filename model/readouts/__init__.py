"""What is read from the last hidden states: the vocabulary, scalars, classes, tokens after the next one."""
