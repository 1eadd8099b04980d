"""Frames of a camera or a video, on their way to an engine and from it: uint8 arrays [height, width, 1 or 3], RGB.

numpy does the work, so that every target gives the same tensors; it is imported by those who use it.
"""
