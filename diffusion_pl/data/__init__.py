"""Images to train on and to measure against: where they come from and how they are read."""
