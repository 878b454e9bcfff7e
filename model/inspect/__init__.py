"""What a model is made of and what it costs: anatomy, description, traces, flops. No forward pass needs it."""
