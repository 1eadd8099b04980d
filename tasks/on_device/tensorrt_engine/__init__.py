"""TensorRT as an engine, 8.0.1 to 11.4: whatever tensorrt module the target's Python has, through one code path.

``bindings`` is the only file that imports it, and says how a name is used that not every version has. A build runs
in a child process (``ladder``), which walks ``parser`` → ``profiles`` → ``precision`` → ``calibration`` → ``dla`` →
``timing_cache`` in ``builder``. ``execution`` runs engines, ``inspector`` looks into them.
"""
