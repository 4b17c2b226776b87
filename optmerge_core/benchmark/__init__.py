"""The embedded benchmarks: tasks, models, training and experiments."""
