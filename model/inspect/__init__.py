"""Inspection of models: parts, costs, descriptions, traces, flops. No forward pass needs it."""
