import os
import time

#: When this process began, but for the interpreter's own start.
STARTED_S = time.monotonic()

# Read when PyTorch is loaded. By default its threads spin where they wait for each other, and beside other busy
# processes on the machine training takes several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
