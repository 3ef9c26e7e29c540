"""Natural GaLore for JAX."""
