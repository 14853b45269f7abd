"""The commands, a file each: `run(options) -> exit code`, and the failures that are no bad input."""
