"""A look at manifests before anything is trained: what there is, and what is likely wrong."""
