"""The papers' objectives, one page each: what a network is trained to do."""
