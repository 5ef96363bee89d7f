"""Slow, literal transcriptions of the papers, in float64: what the library is compared with.

Loops over rows and vocabulary entries, no autograd: every gradient is a closed form worked out
by hand, and `test_reference_identities.py` holds each of them against finite differences. Nothing
here imports a formula of the library.

Inputs are anything `numpy.asarray` takes, detached CPU tensors included.
"""
