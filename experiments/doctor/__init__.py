"""Checks of the machine at hand: collectives against NumPy, and probes for known bugs, each in processes of its own."""
