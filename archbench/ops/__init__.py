"""Kernels: the selective scan and the causal convolution, each at several levels of one ladder.

`scan` and `conv` hold the public functions, `backends` says which level runs and why. Import those modules by name.
"""
