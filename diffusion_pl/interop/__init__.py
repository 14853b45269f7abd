"""Published checkpoints in and out, in the key names that they are published with."""
