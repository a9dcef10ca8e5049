"""Linear separability of a trained model's features: `lsep probe` and what it measures with, after training."""
