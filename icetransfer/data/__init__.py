"""Recordings to batches: readers, checks, features, subsets, loading, cutting; text, synthesis."""
