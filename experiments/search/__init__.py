"""Searching splits for a target."""
