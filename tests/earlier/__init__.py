"""Models, checkpoints and state-dict keys of an earlier commit, which later commits must still read."""
