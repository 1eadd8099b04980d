"""Where an int8 engine loses time: its layers held against those of the fp16 engine of the same network.

TensorRT fuses differently in the two, so layers are not compared one by one: those that share an ONNX node, in
either engine, form a group, and groups are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jetway.configs.schema import Precision, Variant
from jetway.tasks.artifacts import SCHEMA_VERSION
from jetway.tasks.layer_table import Layer

FLOATS = ("fp32", "fp16", "bf16")
#: Groups that the summary names, the worst first.
SHOWN = 12
#: Differences below this share of the fp16 engine's time are the noise of a layer profile.
NOISE_RATIO = 0.005

REFORMAT = "reformats"
QUANTIZER = "quantizers of their own"
FLOAT = "left in float"
FUSION = "fusion broken"
SLOWER = "slower in int8"
ADDED = "only in int8"
_ADVICE = {
    REFORMAT: "neighbours differ in type or layout: quantize both, or neither (qat.keep_float, tensorrt.mixed)",
    QUANTIZER: "no layer took these in: quantize the tensor's other reader too, or keep the layer in float",
    FLOAT: "these have no Q/DQ, or TensorRT found no int8 kernel; tensorrt.int8_rest: fp16 makes float ones faster",
    FUSION: "Q/DQ stand inside what fp16 runs as one layer; tensorrt.quantize_residuals helps residual adds",
    ADDED: "fp16 needs no such layer: casts where int8 ends; make neighbours equal with tensorrt.int8_rest or mixed",
    SLOWER: "int8 kernels do not suit these shapes: name them in tensorrt.mixed as fp16",
}


@dataclass(frozen=True)
class Group:
    """Layers of both engines that compute the same ONNX nodes. Times in ms a query."""

    nodes: tuple[str, ...]
    fp16_ms: float
    int8_ms: float
    fp16_layers: tuple[str, ...]
    int8_layers: tuple[str, ...]
    int8_precisions: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def lost_ms(self) -> float:
        """What int8 takes longer; below 0 is won."""
        return self.int8_ms - self.fp16_ms


@dataclass(frozen=True)
class Int8Report:
    """Two engines of one network, group by group, the greatest loss first."""

    fp16: str
    int8: str
    fp16_ms: float
    int8_ms: float
    groups: tuple[Group, ...]
    lost_ms: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        groups = [asdict(group) | {"lost_ms": group.lost_ms} for group in self.groups]
        return {
            "schema_version": SCHEMA_VERSION,
            **asdict(self),
            "groups": groups,
            "lost_ms": dict(self.lost_ms),
        }


def compare_layers(
    fp16: str, fp16_layers: Sequence[Layer], int8: str, int8_layers: Sequence[Layer]
) -> Int8Report:
    """The report of two variants, by name, from the layer tables that the target measured."""
    noise_ms = NOISE_RATIO * _time_ms(fp16_layers)
    groups = [_group(mine, theirs, noise_ms) for mine, theirs in _joined(fp16_layers, int8_layers)]
    groups.sort(key=lambda group: -group.lost_ms)
    return Int8Report(
        fp16=fp16,
        int8=int8,
        fp16_ms=_time_ms(fp16_layers),
        int8_ms=_time_ms(int8_layers),
        groups=tuple(groups),
        lost_ms=_lost_by_reason(groups, int8_layers),
    )


def int8_reports(variants: Iterable[Variant], layers: Mapping[str, Sequence[Layer]]) -> Iterator[Int8Report]:
    """A report for each int8 variant whose network has an fp16 variant too, where both have a layer table."""
    measured = [variant for variant in variants if variant.name in layers]
    for int8 in measured:
        for fp16 in measured:
            same = (fp16.stage, fp16.on) == (int8.stage, int8.on)
            if int8.precision.is_int8 and fp16.precision is Precision.FP16 and same:
                yield compare_layers(fp16.name, layers[fp16.name], int8.name, layers[int8.name])


def report_markdown(report: Int8Report, *, where: str) -> str:
    """The report for a reader. ``where`` names the target and its board."""
    ratio = report.int8_ms / report.fp16_ms if report.fp16_ms else float("nan")
    lines = [
        f"# Where {report.int8} stands against {report.fp16}",
        "",
        f"Measured on {where}, layer by layer, which takes longer than a whole query. All layers of {report.fp16} "
        f"take {report.fp16_ms:.3f} ms, those of {report.int8} {report.int8_ms:.3f} ms: x{ratio:.3f}.",
        "",
    ]
    lines += _reason_lines(report)
    lines += [
        "",
        "| ONNX nodes | fp16 ms | int8 ms | lost ms | in int8 engine | why |",
        "|---|--:|--:|--:|---|---|",
    ]
    lines += [_group_line(group) for group in report.groups[:SHOWN]]
    won = [group for group in report.groups if group.lost_ms < 0]
    rest = len(report.groups) - SHOWN
    if rest > 0:
        lines.append(f"\n{rest} more groups are in the JSON file beside this one.")
    lines.append(f"\nint8 won {-sum(group.lost_ms for group in won):.3f} ms in {len(won)} groups.")
    return "\n".join(lines) + "\n"


def _joined(fp16: Sequence[Layer], int8: Sequence[Layer]) -> Iterable[tuple[list[Layer], list[Layer]]]:
    """Layers of both engines in groups that share no node, in the order of the network."""
    leaders = _Leaders()
    for layer in (*fp16, *int8):
        leaders.join(_nodes(layer))
    groups: dict[str, tuple[list[Layer], list[Layer]]] = {}
    for side, layers in enumerate((fp16, int8)):
        for layer in layers:
            nodes = _nodes(layer)
            key = leaders.of(min(nodes)) if nodes else f"layer {layer.name}"
            groups.setdefault(key, ([], []))[side].append(layer)
    return groups.values()


def _nodes(layer: Layer) -> frozenset[str]:
    return layer.serves if layer.is_reformat else layer.nodes


class _Leaders:
    """Sets that grow together; each has one member that stands for it."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def of(self, name: str) -> str:
        parent = self._parents.setdefault(name, name)
        return name if parent == name else self.of(parent)

    def join(self, names: Iterable[str]) -> None:
        first, *others = sorted(names) or [""]
        for name in others:
            self._parents[self.of(name)] = self.of(first)


def _group(fp16: list[Layer], int8: list[Layer], noise_ms: float) -> Group:
    fp16_ms, int8_ms = _time_ms(fp16), _time_ms(int8)
    ours, theirs = ({node for layer in side for node in layer.nodes} for side in (fp16, int8))
    return Group(
        # weights are named beside the nodes, and differently in each engine
        nodes=tuple(sorted(ours & theirs or ours | theirs)),
        fp16_ms=fp16_ms,
        int8_ms=int8_ms,
        fp16_layers=tuple(layer.name for layer in fp16),
        int8_layers=tuple(layer.name for layer in int8),
        int8_precisions=tuple(sorted({layer.precision for layer in _computing(int8) if layer.precision})),
        reasons=_reasons(fp16, int8, slower=int8_ms - fp16_ms > noise_ms),
    )


def _reasons(fp16: list[Layer], int8: list[Layer], *, slower: bool) -> tuple[str, ...]:
    """What is seen in the int8 engine; whether it costs, the times say."""
    computing = _computing(int8)
    found = []
    if sum(layer.is_reformat for layer in int8) > sum(layer.is_reformat for layer in fp16):
        found.append(REFORMAT)
    if any(layer.is_quantizer for layer in int8):
        found.append(QUANTIZER)
    if any(layer.precision in FLOATS for layer in computing):
        found.append(FLOAT)
    if len(computing) > len(_computing(fp16)) > 0:
        found.append(FUSION)
    if slower and not found:
        return (SLOWER,) if fp16 else (ADDED,)
    return tuple(found)


def _computing(layers: Iterable[Layer]) -> list[Layer]:
    return [layer for layer in layers if not layer.is_reformat and not layer.is_quantizer]


def _lost_by_reason(groups: Iterable[Group], int8: Sequence[Layer]) -> dict[str, float]:
    """Time of reformats and lone quantizers as it is; of the rest what their groups lost."""
    lost = {
        REFORMAT: _time_ms([layer for layer in int8 if layer.is_reformat]),
        QUANTIZER: _time_ms([layer for layer in int8 if layer.is_quantizer]),
    }
    for reason in (FLOAT, FUSION, SLOWER, ADDED):
        lost[reason] = sum(max(group.lost_ms, 0.0) for group in groups if reason in group.reasons)
    return {reason: ms for reason, ms in lost.items() if ms > 0}


def _time_ms(layers: Iterable[Layer]) -> float:
    return sum(layer.time_ms or 0.0 for layer in layers)


def _reason_lines(report: Int8Report) -> list[str]:
    if not report.lost_ms:
        return ["Nothing was lost to reformats, layers in float or broken fusions."]
    ordered = sorted(report.lost_ms.items(), key=lambda item: -item[1])
    return [f"- **{reason}**: {ms:.3f} ms; {_ADVICE[reason]}." for reason, ms in ordered]


def _group_line(group: Group) -> str:
    nodes = ", ".join(group.nodes) or "; ".join(group.int8_layers or group.fp16_layers)
    shown = nodes if len(nodes) <= 90 else f"{nodes[:87]}..."
    cells = [
        shown.replace("|", "\\|"),
        f"{group.fp16_ms:.4f}",
        f"{group.int8_ms:.4f}",
        f"{group.lost_ms:+.4f}",
        f"{_count(len(group.int8_layers), 'layer')} {', '.join(group.int8_precisions)}".strip(),
        ", ".join(group.reasons) or "-",
    ]
    return f"| {' | '.join(cells)} |"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
