"""Cost and effect of the optimizer's update alone."""
