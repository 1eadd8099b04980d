"""Fake Jetsons: SSH targets on this machine whose kernel files, commands, TensorRT and CUDA are doubles.

They are for tests, and for trying Jetway without a board. A fake says that it is simulated in its name, in its probe
and in every result. What a run on one shows is that the plumbing holds on that board's Python and on the surface of
its TensorRT; none of its figures says anything about a Jetson.
"""
