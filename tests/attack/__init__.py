"""Property-based tests that compare ops with float64 definitions, make invalid calls, and read corrupted files."""
