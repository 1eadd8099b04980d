"""One build with one workspace limit: from an ONNX file to an engine file. It runs in a process of its own."""

import errno
from typing import Any, Callable, Dict, List

from jetway.tasks.on_device import outputs, tensors
from jetway.tasks.on_device.onnx_file import OnnxFile
from jetway.tasks.on_device.tensorrt_engine import (
    bindings,
    calibration,
    dla,
    failure,
    logger,
    parser,
    precision,
    profiles,
    progress,
    settings,
    timing_cache,
)
from jetway.tasks.on_device.transfer import hash_file

# Shares of the work, as far as one can know.
PARSED, BUILT = 0.05, 0.97

Json = Dict[str, Any]
Progress = Callable[[Json], None]


def build(request: Json, report: Progress) -> Json:
    """Writes ``engine_path`` and returns what the passport says about the build.

    Takes ``onnx`` and ``inputs`` (paths), ``options`` (normalised), ``platform``, ``workspace_mib``, ``work_dir``.
    """
    report({"done": 0, "total": 1, "text": "parsing the network"})
    return Build(request, report).run()


class Build:
    """What one build holds on to: TensorRT keeps bare pointers to its parser, profiles and callbacks."""

    def __init__(self, request: Json, report: Progress) -> None:
        trt = bindings.module()
        self.request, self.options, self.report = request, request["options"], report
        self.onnx = OnnxFile(request["onnx"])
        self.logger = logger.shared()
        self.logger.messages.clear()
        trt.init_libnvinfer_plugins(self.logger, "")
        precision.check(self.options, self.onnx)
        self.builder = self._made(trt.Builder, self.logger)
        flags, self.strongly_typed = precision.network_flags(self.options, self.onnx)
        self.network = self.builder.create_network(flags)
        self.kept = []  # type: List[Any]
        self.facts = {"strongly_typed": self.strongly_typed}  # type: Json

    def _made(self, make: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return make(*arguments)
        except TypeError as exc:  # what the bindings raise when TensorRT returns a null pointer
            raise failure.of_messages("TensorRT cannot start: {}".format(exc), self.logger.messages)

    def run(self) -> Json:
        self._parse()
        config = self.builder.create_builder_config()
        self._configure(config)
        cache = self._timing_cache(config)
        self.kept += progress.attach(config, progress.Steps(self._within))
        self.report(
            {"done": PARSED, "total": 1, "text": "building {} layers".format(self.network.num_layers)}
        )
        self._write(self._build(config))
        if cache:
            cache.save(config)
        return self._described(config, cache)

    def _parse(self) -> None:
        compatible = self.options["version_compatible"]
        path = self.request["onnx"]
        self.kept.append(parser.parse(self.network, path, self.onnx, self.logger, compatible))
        self.facts["parser_warnings"] = self.logger.messages.warnings()

    def _configure(self, config: Any) -> None:
        settings.apply(config, self.options, self.request["workspace_mib"])
        precision.set_tf32(config, self.options["tf32"])
        inputs = profiles.inputs_of(self.network)
        shapes = {
            name: entry["shape"] for name, entry in tensors.read_header(self.request["inputs"])[0].items()
        }
        asked = profiles.wanted(self.options["profiles"], inputs, shapes)
        natives = profiles.add(self.builder, config, asked, inputs)
        self.kept += natives
        self.facts["profiles"] = asked
        if not self.strongly_typed:
            self._allow_precisions(config)
        self.feed = self._calibrate(config, natives, profiles.tuned(asked, inputs))
        if self.options["dla"]:
            dla.check(self.builder, self.options, self.onnx, profiles.is_static(asked))
            self.facts["placement"] = dla.place(self.network, config, self.options["dla"])

    def _allow_precisions(self, config: Any) -> None:
        needed = precision.needed_flags(self.options, self.onnx)
        precision.set_flags(config, needed)
        self.facts["mixed"] = precision.keep(self.network, config, self.options["mixed"])
        self.facts["slow_precisions"] = precision.slow_precisions(self.builder, needed)

    def _calibrate(self, config: Any, natives: List[Any], inputs: List[profiles.Input]) -> Any:
        asked = self.options["calibration"]
        if not asked:
            return None
        feed = calibration.feed_of(asked, inputs, bindings.module().__version__)
        native = calibration.calibrator(asked["algorithm"], feed)
        self.kept.append(native)
        calibration.attach(config, native, natives)
        return feed

    def _timing_cache(self, config: Any) -> Any:
        if not self.options["timing_cache"]:
            return None
        cache = timing_cache.TimingCache(self.request["work_dir"], self.request["platform"])
        cache.attach(config)
        return cache

    def _within(self, line: Json) -> None:
        self.report(dict(line, done=PARSED + line["done"] * (BUILT - PARSED)))

    def _build(self, config: Any) -> Any:
        plan = self.builder.build_serialized_network(self.network, config)
        if self.feed is not None and self.feed.error is not None:
            raise self.feed.error
        if plan is None:
            raise failure.of_messages("TensorRT could not build the engine", self.logger.messages)
        return plan

    def _write(self, plan: Any) -> None:
        try:
            with open(self.request["engine_path"], "wb") as file:
                file.write(plan)
        except OSError as exc:
            full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
            raise failure.build_failed(
                "The engine could not be written: {}".format(exc), "disk_full" if full else "unknown"
            )

    def _described(self, config: Any, cache: Any) -> Json:
        warnings = self.logger.messages.warnings()
        self.facts.update(
            flags=settings.flags_set(config),
            layers=self.network.num_layers,
            timing_cache=cache.facts if cache else None,
            warnings=[text for text in warnings if text not in self.facts["parser_warnings"]],
            calibration=self._calibration_facts(),
        )
        if "placement" in self.facts:
            self.facts["placement"] = dla.with_words(self.facts["placement"], warnings)
        return self.facts

    def _calibration_facts(self) -> Any:
        """The calibration cache is a result too: it makes the next build of the network need no batches."""
        if self.feed is None:
            return None
        self.feed.close()
        facts = {"batches": self.feed.batches, "cache_used": self.feed.cache is not None, "cache": None}  # type: Json
        if self.feed.written:
            path = outputs.result_path(self.request["work_dir"], "calibration", ".cache")
            with open(path, "wb") as file:
                file.write(self.feed.written)
            facts["cache"] = {"path": path, "sha256": hash_file(path)}
        return facts
