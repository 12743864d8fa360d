"""The causal Zipformer transducer, and a model on disk: checkpoint, adapters, averages."""
