"""Files: written, digested, fetched, kept and unpickled, each in one place."""
