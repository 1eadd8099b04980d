import torch
from sklearn.datasets import load_digits

from jetway.data.digits import Augmentation, Digits, randomly_moved, split_indices


def test_splits_are_disjoint_and_whole():
    labels = load_digits().target
    splits = split_indices(labels)
    joined = sorted(index for indices in splits.values() for index in indices)
    assert joined == list(range(1797))
    assert [len(splits[name]) for name in ("train", "calibration", "evaluation")] == [1049, 149, 599]


def test_images_are_scaled_and_standardised():
    images = Digits("train", 32).images
    assert images.shape[1:] == (1, 32, 32)
    assert abs(float(images.mean())) < 0.05
    assert abs(float(images.std()) - 1) < 0.1


def test_augmentation_moves_by_seed():
    image, _ = Digits("train", 16)[0]
    augmentation = Augmentation(rotation_degrees=10, shift_ratio=0.1, zoom_ratio=0.1)
    torch.manual_seed(1)
    first = randomly_moved(image["image"], augmentation)
    torch.manual_seed(1)
    assert torch.equal(first, randomly_moved(image["image"], augmentation))
    assert not torch.equal(first, randomly_moved(image["image"], augmentation))
    still = randomly_moved(image["image"], Augmentation())
    assert torch.allclose(still, image["image"], atol=1e-5)
