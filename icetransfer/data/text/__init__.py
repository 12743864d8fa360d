"""Text as the recipes train on it and score it: one normaliser, rules for each language."""
