"""What is computed: Flax NNX modules whose parameters and activations carry logical names, never a mesh axis."""
