"""From recordings and text to batches of features and tokens."""
