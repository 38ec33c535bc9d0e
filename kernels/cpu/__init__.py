"""Kernels for CPUs, in C++: `src/` is compiled when the project is installed, where there is a compiler."""
