"""Where time, files and failure live: configs, data, loop, checkpoints, records, commands."""
