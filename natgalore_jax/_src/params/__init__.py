"""Names, shapes and placement: which parameters, along which axes, on which devices."""
