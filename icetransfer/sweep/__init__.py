"""The grid of cells, on this machine or a Slurm queue: `python -m icetransfer.sweep`."""
