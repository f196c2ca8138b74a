"""GPU kernels in Triton, one file an op. build.py compiles them ahead of time; nothing here needs a GPU or torch."""
