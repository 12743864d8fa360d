"""A page where several models hear the same speech: its server, streams and limits."""
