"""The exported graph and its quantisation."""
