"""Readouts of the last hidden states: the vocabulary, scalars, classes, multi-token prediction."""
