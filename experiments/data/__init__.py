"""Datasets: contract.py and prefetch.py, one file per source, and store/, which they share."""
