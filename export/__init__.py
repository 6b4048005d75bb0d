"""From a rewritten program to files that production runtimes load, and back to a callable."""
