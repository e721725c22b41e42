"""Compiled libraries of sidmlp_kernels; empty until the package is built."""
