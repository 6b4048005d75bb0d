"""Passes over an exported graph: detection, the rewrite, and what makes a graph acceptable to a target."""
