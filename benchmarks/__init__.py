"""Measured claims: one command each; the figures are in RESULTS.md with machine, date and command."""
