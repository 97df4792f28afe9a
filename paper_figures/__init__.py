"""Records to figures: one figure is one file here, and none of them imports jax."""
