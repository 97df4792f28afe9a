"""Helpers for those who work on the project: its architecture as a check, the README prover, the set-up script."""
