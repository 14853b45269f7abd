"""Where a data set may be prepared from: a kind of source a file."""
