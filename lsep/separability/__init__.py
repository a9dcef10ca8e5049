"""Linear separability of a trained model's features, at every depth and time (arXiv 2509.21565, section 4)."""
