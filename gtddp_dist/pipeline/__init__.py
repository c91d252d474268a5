"""Training on a grid of ranks: what each rank is told to do, how long that takes, and the engine that does it."""
