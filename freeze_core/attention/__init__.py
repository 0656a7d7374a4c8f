"""Where a model's attention keeps the activations of its heads."""
