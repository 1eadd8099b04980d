import numpy as np
import pytest
import torch
from pydantic import ValidationError

from jetway.tasks.frames import Boxes, Classes, FrameInput, FrameProcessing


def test_grey_levels_are_taken_as_they_are_where_nothing_is_said():
    declared = FrameInput(name="image", size=(6, 4))
    assert (declared.mean, declared.deviation) == ((0.0,) * 3, (1.0,) * 3)
    assert declared.shape == (1, 3, 4, 6)
    assert FrameInput(name="image", size=(6, 4), colour="gray").shape == (1, 1, 4, 6)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"mean": (1.0,)}, "3 values"),
        ({"colour": "gray", "mean": (1.0, 2.0, 3.0)}, "1 values"),
        ({"dtype": "uint8", "mean": (1.0, 2.0, 3.0)}, "leave mean and deviation out"),
        ({"deviation": (1.0, 0.0, 1.0)}, "greater than 0"),
        ({"size": (0, 4)}, "greater than or equal to 1"),
    ],
)
def test_declarations_that_contradict_themselves_are_refused(changes, what):
    with pytest.raises(ValidationError, match=what):
        FrameInput(**{"name": "image", "size": (6, 4), **changes})


@pytest.mark.parametrize("colour", ["rgb", "bgr"])
def test_the_frame_of_an_input_is_the_one_that_becomes_it(colour):
    frame = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    declared = FrameInput(name="image", size=(6, 4), colour=colour, mean=(3, 5, 7), deviation=(50, 60, 70))
    ordered = frame[:, :, ::-1] if colour == "bgr" else frame
    tensor = (torch.from_numpy(ordered.copy()).float() - torch.tensor([3.0, 5, 7])) / torch.tensor(
        [50.0, 60, 70]
    )
    assert (declared.frame_of(tensor.permute(2, 0, 1)) == frame).all()


def test_values_beyond_grey_levels_are_cut():
    declared = FrameInput(name="image", size=(1, 1), colour="gray")
    assert declared.frame_of(torch.tensor([[[300.0]]])).item() == 255
    assert declared.frame_of(torch.tensor([[[-3.0]]])).item() == 0


def test_results_name_their_outputs_and_survive_json():
    image = FrameInput(name="image", size=(8, 8))
    boxes = FrameProcessing(input=image, results=Boxes(class_logits="c", distances="d", strides=(8,)))
    assert boxes.outputs == ("c", "d")
    assert FrameProcessing(input=image, results=Classes(output="c")).outputs == ("c",)
    assert FrameProcessing.model_validate_json(boxes.model_dump_json()) == boxes
