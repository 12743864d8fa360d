"""Recordings to batches: readers, checks, features, subsets, loading, text, synthesis, long files."""
