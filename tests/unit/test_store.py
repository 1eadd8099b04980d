import pytest

from jetway.tasks.artifacts import Checkpoint, OnnxModel, Report, StageOutput
from jetway.tasks.errors import ArtifactError
from jetway.tasks.store import Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def added(store, tmp_path, content=b"weights"):
    path = tmp_path / "file"
    path.write_bytes(content)
    return store.add(Checkpoint, path, parents=("0" * 64,), metadata={"epoch": 3})


def test_added_file_opens_by_handle(store, tmp_path):
    handle = added(store, tmp_path)
    assert store.open(handle).read_bytes() == b"weights"
    assert handle.size_bytes == 7
    assert not (tmp_path / "file").exists()


def test_missing_file_says_what_to_do(store, tmp_path):
    handle = added(store, tmp_path)
    store.path_of(handle).unlink()
    with pytest.raises(ArtifactError, match="Run the pipeline again"):
        store.open(handle)


def test_corrupt_file_is_refused(store, tmp_path):
    handle = added(store, tmp_path)
    store.path_of(handle).write_bytes(b"weightz")
    with pytest.raises(ArtifactError, match="corrupt"):
        store.open(handle)


def test_scratch_leaves_nothing_behind_after_an_error(store):
    with pytest.raises(RuntimeError), store.scratch() as folder:
        (folder / "partial").write_text("x")
        raise RuntimeError
    assert list((store.root / "tmp").iterdir()) == []


def test_json_survives(store):
    handle = store.add_json({"b": 1, "a": [2.5, None]})
    assert store.load_json(handle) == {"a": [2.5, None], "b": 1}


def test_handles_are_equal_by_content_not_by_place(store, tmp_path):
    handle = added(store, tmp_path)
    assert handle == handle.model_copy(update={"uri": "elsewhere", "parents": ()})
    assert handle != added(store, tmp_path, b"other")
    assert handle != OnnxModel(sha256=handle.sha256, size_bytes=7)


def test_stage_output_keeps_the_types_of_its_handles(store, tmp_path):
    output = StageOutput(
        handle=added(store, tmp_path), files={"t.json": store.add_json({})}, metrics={"top1": 0.5}
    )
    again = StageOutput.model_validate_json(output.model_dump_json())
    assert isinstance(again.handle, Checkpoint)
    assert isinstance(again.files["t.json"], Report)
    assert again.handle.metadata == {"epoch": 3}
