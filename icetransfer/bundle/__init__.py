"""What is handed over: the settings of a bundle, where they come from, its README and its check."""
