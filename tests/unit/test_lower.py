from jetway.configs.schema import BACKENDS, ExportConfig, Precision, QatConfig, TensorRtConfig
from jetway.tasks.checkpoint import save_checkpoint
from jetway.tasks.export import export_onnx
from jetway.tasks.lower import lower
from jetway.tasks.workloads.digits import DigitsClassifier


def test_raising_the_revision_of_qat_lowers_again(make_context, tmp_path):
    context = make_context(DigitsClassifier(), tmp_path, reuse=True)
    checkpoint = save_checkpoint(context.store, context.workload.network(), structure=None)
    model = export_onnx(context, checkpoint, ExportConfig(), Precision.FP32).handle
    cached = []
    for revision in (1, 1, 2):
        config = QatConfig(revision=revision)
        lower.fn(context, model, BACKENDS["ort-cpu"], Precision.FP32, config, TensorRtConfig())
        cached.append(context.finished[-1].cached)
    assert cached == [False, True, False]
