"""Property-based attacks: every op against float64 definitions, wrong calls, corrupted files. See __main__.py."""
