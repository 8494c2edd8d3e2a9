"""Kernels, each at several levels of one ladder: scans, convolutions, attention, and whole decode steps.

`scan`, `ssd`, `conv` and `attention` hold the public functions, `decode` and `recurrent` what reads a few tokens
through a whole model; `backends` says which level runs and why. Import those modules by name.
"""
