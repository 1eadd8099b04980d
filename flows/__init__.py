import time

#: When this process began, but for the interpreter's own start.
STARTED_S = time.monotonic()
