"""The parts of bench/on_gpu.sh: one module per part, each run in a separate process.

The module of a part has a function `rows(plan)` that yields rows, which are dictionaries. The "status" of a row is "ok",
"failed" (an error in this library) or "skipped". In failed and skipped rows, "why" contains the reason. Rows are recorded as
they are yielded, so the rows before a crash are kept.
"""
