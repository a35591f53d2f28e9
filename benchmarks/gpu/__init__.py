"""Everything of kdhooks that needs a GPU to be believed, run and recorded by one command."""
