"""One paper, one module. `kdhooks methods` lists them."""
