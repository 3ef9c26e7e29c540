"""New bases for the matrices that are due, and the state that moves with them."""
