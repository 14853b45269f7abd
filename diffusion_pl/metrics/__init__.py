"""How near generated images are to real ones: features, distances, scores and their reference."""
