"""The parts of bench/on_gpu.sh: one module per part, each run in a separate process.

Each module has a function `rows(plan)` that yields dictionaries. The "status" of a dictionary is "ok", "failed" (an error in
this library) or "skipped". The last two give the reason in "why". Rows are recorded as they are yielded, so a part that crashes
keeps its earlier rows.
"""
