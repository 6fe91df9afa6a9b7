"""The parts of bench/on_gpu.sh: one module per part, each run in a separate process.

A part is a function `rows(plan)` that yields dictionaries. Each has a "status" of "ok", "failed" (an error of this library) or
"skipped", and a "why" for the last two. Rows are recorded as they are yielded, so a part that crashes keeps its earlier rows.
"""
