"""Measuring: how fast, how exact, how much memory, beside whoever does the same work.

    providers  who can do an operator's work: our backends, plain and compiled PyTorch, SDPA, the installed peers
    measure    one operator at one size: checked against float64, then timed, in turns
    sweep      `vix bench`
    models     `vix bench --models`
    draw       the pictures

`pytest --benchmark`, `vix bench` and bench/on_gpu.sh all measure with this.
"""
