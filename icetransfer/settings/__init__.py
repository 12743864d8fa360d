"""What the config tree is made of: its sections, how YAML is read into it, and its reference."""
