"""Training: the LightningModule that wraps any objective, and what runs it."""
