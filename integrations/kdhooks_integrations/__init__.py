"""One host, one module: recipe + distiller + the host."""
