"""Fused kernels and their torch counterparts; the plain formulas are in `functional`."""
