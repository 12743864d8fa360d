"""Many experiments: the plan of a grid, running it here or in a queue, where it is."""
