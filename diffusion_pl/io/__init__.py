"""Writing, hashing, downloading, caching and unpickling files."""
