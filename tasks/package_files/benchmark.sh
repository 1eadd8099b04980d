#!/bin/sh
# Times the engine beside this file:  sh benchmark.sh [runs]
# PYTHON names the interpreter, python3 by default.
set -eu
exec "${PYTHON:-python3}" "$(dirname -- "$0")/infer.py" --benchmark "${1:-200}"
