"""Models, checkpoints and state-dict keys written by an earlier commit. Later commits must be able to load them."""
