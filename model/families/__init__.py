"""Families of models: how their configs and tensor names map to ours. The model itself never asks for one."""
