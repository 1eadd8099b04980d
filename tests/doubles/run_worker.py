"""Runs verbs of the worker, one after the other, in one process of any Python from 3.6: reads a JSON list of
``[verb, request, variables]`` from stdin and writes the list of outcomes. ``argv``: the agent, the work folder.

A text ``{"result": 3, "key": "engine"}`` in a request stands for what an earlier verb gave.
"""

import json
import os
import sys

sys.path.insert(0, sys.argv[1])

from jetway.tasks.on_device import job


def main():
    work_dir, outcomes = os.path.abspath(sys.argv[2]), []
    for verb, request, variables in json.loads(sys.stdin.read()):
        os.environ.update(variables)
        lines = []
        spec = {"verb": verb, "work_dir": work_dir, "request": filled(request, outcomes)}
        outcomes.append(dict(job.run_verb(spec, lines.append), progress=len(lines)))
        for name in variables:
            del os.environ[name]
    json.dump(outcomes, sys.stdout)


def filled(value, outcomes):
    """The request with earlier results in their places; of a verb that failed there are none."""
    if isinstance(value, list):
        return [filled(each, outcomes) for each in value]
    if not isinstance(value, dict):
        return value
    if "from_verb" not in value:
        return {name: filled(each, outcomes) for name, each in value.items()}
    found = outcomes[value["from_verb"]].get("result", {})
    for key in value["keys"]:
        found = found.get(key) if isinstance(found, dict) else None
    return found


main()
