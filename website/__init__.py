"""What builds the documentation site: `make docs`."""
