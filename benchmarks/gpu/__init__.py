"""One command that runs and records everything whose results only count on a GPU."""
