"""Property-based attacks: ops against float64 definitions, wrong calls and corrupted files. See __main__.py."""
