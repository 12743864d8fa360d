"""The fine-tuning: losses, optimiser, run and resume, faults, processes."""
