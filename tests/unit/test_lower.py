from jetway.configs.schema import EngineName, ExportConfig, Precision, QatConfig
from jetway.tasks.checkpoint import save_checkpoint
from jetway.tasks.export import export_onnx
from jetway.tasks.lower import lower
from jetway.tasks.stage import StageContext
from jetway.tasks.store import Store
from jetway.tasks.workloads.digits import DigitsClassifier


class Memory:
    """The index of finished stages, in this process."""

    def __init__(self):
        self.outputs = {}

    def find(self, key):
        return self.outputs.get(key)

    def record(self, key, stage, output, seconds):
        self.outputs[key] = output


def test_raising_the_revision_of_qat_lowers_again(tmp_path, monkeypatch):
    monkeypatch.setenv("JETWAY_HOME", str(tmp_path))
    context = StageContext(DigitsClassifier(), Store(tmp_path / "store"), threads=1, index=Memory())
    checkpoint = save_checkpoint(context.store, context.workload.network(), structure=None)
    model = export_onnx(context, checkpoint, ExportConfig(), Precision.FP32).handle
    cached = []
    for revision in (1, 1, 2):
        lower.fn(context, model, EngineName.ONNXRUNTIME, QatConfig(revision=revision))
        cached.append(context.finished[-1].cached)
    assert cached == [False, True, False]
