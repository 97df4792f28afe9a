"""One file a command: `main(argv) -> int`; the first line of its docstring is its help line."""
