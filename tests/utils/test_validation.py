"""Error messages state the input, the expected form and the fix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zepad_mm.utils.names import check_names, clean_name
from zepad_mm.utils.validation import check_count, check_device, check_epsilon, check_images, check_labels

GOOD = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.zeros((2, 3, 4, 4), np.float32), TypeError, "to_tensor"),
        ([GOOD], TypeError, "torch.Tensor"),
        (GOOD[0], ValueError, r"images\[None\]"),
        (GOOD[:, :1], ValueError, "expand"),
        (torch.cat([GOOD, GOOD[:, :1]], 1), ValueError, r"images\[:, :3\]"),
        (GOOD.permute(0, 2, 3, 1), ValueError, r"permute\(0, 3, 1, 2\)"),
        ((GOOD * 255).byte(), ValueError, r"images.float\(\) / 255"),
        (GOOD > 0.5, ValueError, "torch.bool"),
        (GOOD * 255, ValueError, "images / 255"),
        (GOOD * 2 - 1, ValueError, "raw pixels"),
        (GOOD.clone().index_fill_(0, torch.tensor(1), float("nan")), ValueError, "NaN"),
        (GOOD.clone().index_fill_(0, torch.tensor(1), float("inf")), ValueError, "infinity"),
        (GOOD.clone().index_fill_(0, torch.tensor(1), -float("inf")), ValueError, "infinity"),
        (GOOD.to("meta"), ValueError, "on meta, without values"),
        (GOOD.to_sparse(), ValueError, r"images.to_dense\(\)"),
    ],
)
def test_check_images_names_the_fix(images, error, message):
    with pytest.raises(error, match=message):
        check_images(images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_check_images_returns_valid_images(dtype):
    images = GOOD.to(dtype)
    assert check_images(images) is images
    assert check_images(images[:0]).shape == (0, 3, 4, 4)


def test_check_images_tolerates_rounding():
    check_images(torch.full((1, 3, 2, 2), 1 + 5e-7))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "true labels"),
        ([0, 1], "torch.as_tensor"),
        (torch.tensor([0]), r"\(2,\) integer"),
        (torch.tensor([[0], [1]]), r"\(2,\) integer"),
        (torch.tensor([0.0, 1.0]), "float32"),
        (torch.tensor([True, False]), "bool"),
        (torch.tensor([0, -1]), "at least 0"),
    ],
)
def test_check_labels_rejects(labels, message):
    with pytest.raises(ValueError, match=message):
        check_labels(labels, GOOD)


def test_check_labels_converts_integer_types():
    assert check_labels(torch.tensor([0, 3], dtype=torch.uint8), GOOD).dtype == torch.int64


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("cat", r"\['cat'\]"),
        ([], "empty"),
        (["cat", " "], "non-empty"),
        (["cat", "cat"], "cat"),
        (None, "got None; write e.g."),
        (5, "got 5; write e.g."),
        ({"cat", "dog"}, r"has no order; write sorted\(...\)"),
        (["caf\udce9", "cat"], "is not valid Unicode; expected UTF-8"),
        (["\u200b", "cat"], "names with letters"),
        (["cat", "c\u00adat"], "given more than once"),
        (["cat", "\u202ecat", "cat\x07"], "given more than once"),
    ],
)
def test_check_names_rejects(names, message):
    with pytest.raises(ValueError, match=message):
        check_names(names)


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("T_shirt ", "T shirt"),
        ("zero\u200bwidth", "zerowidth"),
        ("bell\x07 \u202eright\u202c", "bell right"),
        ("\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f468\u200d\U0001f469\u200d\U0001f467"),  # a family
        ("\U0001f3f4\U000e0067\U000e007f", "\U0001f3f4\U000e0067\U000e007f"),  # the flag of a region
        ("می\u200cخواهم", "می\u200cخواهم"),
    ],
)
def test_clean_name_drops_what_nobody_sees(name: str, clean: str) -> None:
    assert clean_name(name) == clean
    assert check_names(np.array([name, "other"]))[0] == name


def test_check_names_returns_a_list():
    assert check_names(("cat", "dog")) == ["cat", "dog"]


@pytest.mark.parametrize("epsilon", [8, -0.1, float("nan"), float("inf"), "8/255", None, True])
def test_check_epsilon_rejects(epsilon):
    with pytest.raises(ValueError, match="8/255, not 8"):
        check_epsilon(epsilon)


@pytest.mark.parametrize("epsilon", [0, 0.5, 1, np.float64(0.1)])
def test_check_epsilon_accepts(epsilon):
    assert check_epsilon(epsilon) == float(epsilon)


@pytest.mark.parametrize(
    "names", [("t_shirt", "t shirt"), ("café", "cafe\u0301"), ("Dress", "dress "), ("a", "a"), ("Straße", "STRASSE")]
)
def test_check_names_refuses_names_that_are_the_same_text(names: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="given more than once"):
        check_names(names)


def test_names_of_published_data_sets_may_differ_in_case_alone() -> None:
    assert check_names(["Cardigan", "cardigan"], fold_case=False) == ["Cardigan", "cardigan"]
    with pytest.raises(ValueError, match="given more than once"):
        check_names(["cardigan", "cardigan "], fold_case=False)


def test_check_names_is_bounded_and_fast() -> None:
    names = [f"name {number}" for number in range(100_000)]
    assert check_names(names) == names
    with pytest.raises(ValueError, match="at most 100,000, got 100,001"):
        check_names([*names, "more"])
    with pytest.raises(ValueError, match="names with letters"):
        check_names(["_", "a"])


@pytest.mark.parametrize("device", ["cudaa", "cuda:99", 3.5])
def test_check_device_names_those_that_are_there(device):
    with pytest.raises(ValueError, match=r"device: expected one of cpu.*got"):
        check_device(device)
    check_device(None)
    check_device("cpu")


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, None])
def test_check_count_rejects(value):
    with pytest.raises(ValueError, match="n: expected a whole number of at least 1, got"):
        check_count(value, "n")
    assert check_count(np.int64(3), "n") == 3
