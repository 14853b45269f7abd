"""The commands, a file each: `run(options) -> exit code`, and its failures beside bad input."""
