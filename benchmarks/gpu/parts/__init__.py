"""A module for each part; `Part` in benchmarks/gpu/part.py is the contract of such a module."""
