"""The parts of bench/on_gpu.sh. Each part is one module, and runs in a separate process.

The function `rows(plan)` of a part yields rows as dictionaries. The "status" of a row is "ok", "failed" (an error in this
library) or "skipped". In failed and skipped rows, "why" contains the reason. Rows are recorded as they are yielded, so the rows
before a crash are kept.
"""
