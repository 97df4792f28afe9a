"""Proof that a split computes what one device computes: trials, error budgets, and the search for where two part."""
