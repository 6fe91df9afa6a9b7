"""Measurements of speed, accuracy, memory and traffic, on this machine or for GPUs that are not present.

timing          time of a call, on the device and by the wall clock
machine         name, versions and peak rates of this machine
providers       implementations of an operator: our backends, plain and compiled PyTorch, SDPA, the installed peers
operators       one operator at one size: checked against float64, then timed, in turns
models          models compared with their originals
sweep           `vix bench`
pictures        figures of its results
check           `vix check`
costs, roofline     arithmetic, bytes and launches of a call; `vix dev roofline`
traffic         bytes that the kernels move; `vix dev traffic`
interpreter     Triton's interpreter, made faster and observed
offline, machine_code           compilation for GPUs that are not present, and the resources that the code uses
compile_report, compile_table   `vix dev compile-report`
sources         hashes of kernel sources and tiles
shared_memory   shared memory of every entry of the launch table; `vix dev compile-report --shared`
tune            `vix dev tune`
"""
