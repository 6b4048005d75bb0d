"""Tiny models of every architecture, each with what its source says about its attention."""
