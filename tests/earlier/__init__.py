"""What an earlier commit wrote, and what it called things: models, checkpoints and keys that later commits must still read."""
