"""The exported graph, its quantisation, weights that tiers share."""
