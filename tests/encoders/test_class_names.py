"""Class names as the tokenizer reads them."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tests.helpers import encoder_zoo as zoo
from tests.helpers.models import write_clip
from zepad_mm.encoders import TextEncoder, load_clip

LONG = "a very long description of a garment that goes on and on about cloth and thread and "


@pytest.fixture(params=["open_clip", "hf", "embedded"])
def text(request: pytest.FixtureRequest, tmp_path: Path) -> TextEncoder:
    if request.param == "embedded":
        return load_clip("open_clip:embedded")[1]
    source = write_clip(tmp_path) if request.param == "open_clip" else zoo.ZOO["hf: CLIP"](tmp_path).source
    return load_clip(source)[1]


def test_class_names_that_are_cut_off_are_named(text: TextEncoder) -> None:
    with pytest.warns(UserWarning, match="1 of 2 class names are cut off"):
        text.class_embeddings([LONG * 3, "hat"], "single")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.class_embeddings(["dress", "hat"], "single")


def test_class_names_that_become_the_same_when_cut_off_are_refused(text: TextEncoder) -> None:
    with pytest.raises(ValueError, match="are the same tokens to"):
        text.class_embeddings([LONG * 3 + "red", LONG * 3 + "blue"], "single")


def test_class_names_that_differ_in_case_alone_have_one_embedding_and_a_warning(text: TextEncoder) -> None:
    if text._tokens(["Hat"]) != text._tokens(["hat"]):
        pytest.skip("this tokenizer reads upper case")
    with pytest.warns(UserWarning, match="'Hat' and 'hat' are the same tokens"):
        embeddings = text.class_embeddings(["Hat", "dress", "hat"], "single")
    assert embeddings[0].equal(embeddings[2])
    assert not embeddings[0].allclose(embeddings[1])
