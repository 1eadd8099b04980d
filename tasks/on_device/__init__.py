"""What runs ON a target: Python 3.6 syntax, standard library only, engines imported when used.

The host packs this folder into one zipapp, as ``jetway/tasks/on_device`` with two empty parents, so that
``from jetway.tasks.on_device import errors`` means the same on the target and in the tests on the host.

``__main__`` maps a verb to the module of that name. Such a module exposes::

    def run(request: dict, progress: Callable[[dict], None]) -> dict

It takes a JSON request, hands JSON lines to ``progress`` as it goes (``{"done": 3, "total": 10, "text": ""}``
and whatever else the stage on the host wants), returns a JSON result, and raises ``errors.DeviceError``
for what it expects to fail. It may print what it likes: stdout and stderr go to the job's log.

The request also holds ``work_dir``, the absolute path of the target's work folder. The current folder of a
job is its own and is removed with it, so scratch files belong there. Blobs whose paths are in a request were
checked against their digests before ``run``.
"""
