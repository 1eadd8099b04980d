"""From an ONNX file to a network, with everything that the parser had to say about it."""

import re
import sys
from typing import Any, Dict, List

from jetway.tasks.on_device import errors
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.onnx_file import OnnxFile
from jetway.tasks.on_device.tensorrt_engine import bindings

SHOWN = 30
NAMED = re.compile(r"In node -?\d+ with name: (?P<node>.*?) and operator: (?P<operator>\S+)")
OPERATOR = re.compile(r"No importer registered for op: (?P<operator>\S+?)[.,;]?(\s|$)")


def parse(network: Any, onnx_path: str, onnx: OnnxFile, logger: Any, version_compatible: bool) -> Any:
    """Fills the network; the returned parser owns its weights and must live until the build is over.

    Weights in files of their own are found beside the ONNX file. Raises DeviceError (build_failed) with every error,
    its node and its operator.
    """
    trt = bindings.module()
    parser = trt.OnnxParser(network, logger)
    plain = bindings.member("OnnxParserFlag", "NATIVE_INSTANCENORM")
    if version_compatible and bindings.has(parser, "set_flag"):
        parser.set_flag(plain)  # its plugin would tie the engine to this version
    if not parser.parse_from_file(onnx_path):
        found = [describe(parser.get_error(index), onnx.nodes) for index in range(parser.num_errors)]
        raise failure(found or [_silent(logger)], trt.__version__)
    return parser


def describe(error: Any, nodes: List[Dict[str, str]]) -> Dict[str, str]:
    """An error of the parser: ``code``, ``node``, ``operator`` and ``text``.

    Newer versions name the node. Older ones give its place in the file, and some their description's words.
    """
    code, text = error.code().name, " ".join(error.desc().split())
    node, operator = "", ""
    if bindings.has(error, "node_name"):
        node = error.node_name()
    if bindings.has(error, "node_operator"):
        operator = error.node_operator()
    named = NAMED.search(text) or OPERATOR.search(text)
    words = named.groupdict() if named else {}
    index = error.node()
    in_file = nodes[index] if 0 <= index < len(nodes) else {"name": "", "operator": ""}
    operator = operator or words.get("operator") or in_file["operator"]
    if not node and operator == in_file["operator"]:
        node = in_file["name"]
    return {"code": code, "node": node or words.get("node", ""), "operator": operator, "text": text}


def failure(found: List[Dict[str, str]], version: str) -> DeviceError:
    lines = [_sentence(error) for error in found]
    for line in lines:
        sys.stderr.write("ONNX parser: {}\n".format(line))
    more = "; and {} more, see the log".format(len(lines) - SHOWN) if len(lines) > SHOWN else ""
    unsupported = all(error["code"].startswith("UNSUPPORTED") for error in found)
    advice = (
        "Replace these layers, or export with another opset" if unsupported else "Export the network again"
    )
    return DeviceError(
        "TensorRT {} cannot take this network; {} (export.opset): {}{}.".format(
            version, advice, "; ".join(lines[:SHOWN]), more
        ),
        errors.BUILD_FAILED,
        "unsupported_operator" if unsupported else "unknown",
    )


def _sentence(error: Dict[str, str]) -> str:
    place = "operator {}".format(error["operator"]) if error["operator"] else "the file"
    node = " (node {!r})".format(error["node"]) if error["node"] else ""
    return "{}{}: {} {}".format(place, node, error["code"], error["text"])


def _silent(logger: Any) -> Dict[str, str]:
    text = "; ".join(logger.messages.errors()) or "no reason given"
    return {"code": "INTERNAL_ERROR", "node": "", "operator": "", "text": text}
