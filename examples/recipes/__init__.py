"""Short programs to copy, one subject each. docs/recipes.md lists them."""
