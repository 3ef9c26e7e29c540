"""Environment, time and shapes of measurements; result files; runs in processes of their own."""
