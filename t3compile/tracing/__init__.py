"""Ways to a graph: what is done to a module before and while it is traced."""
