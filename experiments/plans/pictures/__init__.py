"""The pictures of a plan's page: HTML and SVG as text, made from plain values. No network, no script."""
