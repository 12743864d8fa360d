"""The model's kernels in Triton, each with the function of torch tensors that runs it."""
