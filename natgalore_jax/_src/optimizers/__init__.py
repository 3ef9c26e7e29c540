"""Ready-made optimizers: chains of the parts."""
