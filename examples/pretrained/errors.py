"""The error for weights that cannot be used."""


class WeightsError(Exception):
    """One line that names the file and the tensors at fault; programs print it and exit with 1."""
