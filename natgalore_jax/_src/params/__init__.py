"""Which parameters are projected, along which axes, and where their arrays are: from names and shapes alone."""
