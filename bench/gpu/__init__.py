"""The parts of bench/on_gpu.sh: one module per part, each run in a separate process.

The module of a part has a function `rows(plan)` that yields dictionaries. The "status" of a dictionary is "ok", "failed" (an
error in this library) or "skipped". For failed and skipped work, "why" contains the reason. Rows are recorded as they are
yielded, so the rows before a crash are kept.
"""
