"""The transformations: into a subspace, the natural gradient inside, and back."""
