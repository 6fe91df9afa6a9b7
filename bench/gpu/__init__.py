"""What bench/on_gpu.sh runs: one module a part, each in a process of its own.

A part is a function `rows(plan)` that yields dictionaries. Each has a "status": "ok", "failed" (something of ours is wrong)
or "skipped", and a "why" for the last two. Rows are kept as they come, so a part that crashes leaves what it had.
"""
