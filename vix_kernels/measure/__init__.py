"""Measurements of speed, accuracy, memory and traffic, on this machine or for GPUs that are not present.

timing          device time and wall-clock time of a call
machine         device name, package versions and peak rates of this machine
providers       implementations of an operator: this library's backends, plain and compiled PyTorch, SDPA, other packages
operators       one operator at one size: a check against float64, then the time of each provider
models          comparison of the models with the original implementations
sweep           `vix bench`
pictures        plots of the results of `vix bench`
check           `vix check`
costs, roofline     FLOPs, bytes and launches of a call; `vix dev roofline`
traffic         bytes that the kernels load and store; `vix dev traffic`
interpreter     patches that make Triton's interpreter faster, and hooks for its memory accesses
offline, machine_code       compilation for GPUs that are not present, and the resource usage of the machine code
observed        kernel launches of a call, recorded without compilation and identified by hashes
ttgir, counting     loops and logits in Triton's intermediate representation, and instruction counts of the machine code
compile_report, compile_cell    `vix dev compile-report`: the command and its workers
compile_table, budgets          the table of the compile report, and its checks
launch_times, flash     predicted time of each launch, and a comparison with published times of FlashAttention
sources         hashes of the source code of kernels
host_time       `vix dev host-time`
break_even      break-even lengths of attention methods, relative to softmax attention
shared_memory   shared memory that each entry of the launch table needs; `vix dev compile-report --shared`
tune            `vix dev tune`
"""
