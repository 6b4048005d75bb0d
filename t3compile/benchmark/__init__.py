"""A rewritten model measured beside what would be used in its place.

Program -> variants -> measured processes -> report. Nothing is imported here: a measured process holds only what it
runs.
"""
