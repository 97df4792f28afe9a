"""Compiled modules: reading them, and holding what is predicted to them."""
