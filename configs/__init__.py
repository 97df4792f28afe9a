"""One file an experiment: its docstring is claim, command, cost and expected result; `config()` returns the value."""
