"""Plans: making one, and showing it."""
