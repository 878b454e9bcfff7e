"""Merges models of one architecture into one, a tensor at a time and in float32: `python -m model merge`."""
