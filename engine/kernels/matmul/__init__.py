"""Products of quantized weights with activations, for GPUs and CPUs."""
