"""A model as a stream: search, streams of audio, ONNX and sherpa-onnx engines, latency."""
