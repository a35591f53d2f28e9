"""One module for each part: `Part` in benchmarks/gpu/part.py says what such a module holds."""
