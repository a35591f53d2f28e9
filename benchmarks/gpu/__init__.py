"""One command that runs and records everything whose results are meaningful only on a GPU."""
