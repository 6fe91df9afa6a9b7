"""Everything that measures: how fast, how exact, how much memory and traffic, on this machine or on GPUs that are not there.

timing          the time of a call, on the device and by the wall clock
machine         which machine this is, and what it reaches
providers       who can do an operator's work: our backends, plain and compiled PyTorch, SDPA, the installed peers
operators       one operator at one size: checked against float64, then timed, in turns
models          models beside their originals
sweep           `vix bench`
pictures        of its results
check           `vix check`
costs, roofline     arithmetic, bytes and launches of a call; `vix dev roofline`
traffic         the bytes that kernels move; `vix dev traffic`
interpreter     Triton's interpreter, faster and watched
offline, machine_code           compiling for GPUs that are not there, and what the code needs
compile_report, compile_table   `vix dev compile-report`
shared_memory   what every entry of the launch table needs; `vix dev compile-report --shared`
tune            `vix dev tune`
"""
