"""MLflow, whose only home this package is. ``tracker.Tracker`` is the way in."""

import os

# mlflow reads these while it is imported, and when it first calls a server.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# The tracker retries by itself: a repeated create_run would make a second run.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
