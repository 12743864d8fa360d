"""The causal Zipformer transducer."""
