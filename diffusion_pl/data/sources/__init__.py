"""Sources that a data set can be prepared from, one kind a file."""
