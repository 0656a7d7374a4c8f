"""How a config becomes frozen activations in a running model."""
