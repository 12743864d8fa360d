"""Recordings to batches: readers, checks, features, subsets, loading; text and synthetic speech."""
