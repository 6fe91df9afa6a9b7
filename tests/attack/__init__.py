"""Property-based tests, which compare ops with float64 definitions, make invalid calls and read corrupted files."""
