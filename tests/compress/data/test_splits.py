from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitrim.compress.data.preprocessing import Preprocessing
from vitrim.compress.data.splits import Split, require_splits, stratified_indices
from vitrim.core.errors import InputError

SIZE = Preprocessing(channels=1, height=2, width=2, mean=(0.5,), std=(0.5,))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.floats(0, 1), st.integers(0, 1000))
def test_a_division_is_complete_stratified_and_repeatable(
    labels: list[int], share: float, seed: int
) -> None:
    targets = np.array(labels, dtype=np.int64)
    count = int(share * len(targets))
    selected, rest = stratified_indices(targets, count, seed)
    assert len(selected) == count
    assert sorted([*selected, *rest]) == list(range(len(targets)))
    for label in np.unique(targets):
        exact = (targets == label).sum() * count / len(targets)
        assert abs((targets[selected] == label).sum() - exact) < 1
    again, _ = stratified_indices(targets, count, seed)
    assert np.array_equal(selected, again)


def test_seeds_give_different_divisions() -> None:
    targets = np.zeros(100, dtype=np.int64)
    assert not np.array_equal(
        stratified_indices(targets, 50, 0)[0], stratified_indices(targets, 50, 1)[0]
    )


def test_more_images_than_there_are_cannot_be_selected() -> None:
    with pytest.raises(InputError, match="5 images of 3 requested"):
        stratified_indices(np.zeros(3, dtype=np.int64), 5, 0)


def test_a_selection_of_a_selection_shares_its_pixels() -> None:
    pixels = np.arange(40, dtype=np.uint8).reshape(10, 1, 2, 2)
    split = Split(pixels, np.arange(10), SIZE)
    part = split.select(np.array([7, 3, 5])).select(np.array([2, 0]))
    assert part.pixels is pixels
    images, labels = part.batch(slice(None))
    assert labels.tolist() == [5, 7]
    assert images[:, 0, 0, 0].tolist() == [20, 28]
    assert np.array_equal(part.arrays()[0], part.floats().numpy())
    assert len(part.arrays(limit=1)[1]) == 1


def test_writing_to_a_batch_does_not_change_the_data() -> None:
    split = Split(np.zeros((2, 1, 2, 2), np.uint8), np.zeros(2, np.int64), SIZE)
    images, labels = split.batch(slice(0, 2))
    images += 1
    labels += 1
    assert np.asarray(split.pixels).sum() == 0
    assert split.targets.sum() == 0


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ([], [], "the data set is empty"),
        ([0, 1], [], "the val split holds no images"),
        ([1, 1], [0], r"all training images are of one class \(b\)"),
        ([0, 2], [0], r"label outside 0\.\.1"),
    ],
)
def test_splits_that_cannot_be_learned_from_are_refused(
    train: list[int], val: list[int], message: str
) -> None:
    targets = {"train": np.array(train, np.int64), "val": np.array(val, np.int64)}
    with pytest.raises(InputError, match=message):
        require_splits("mine", targets, ("a", "b"))
