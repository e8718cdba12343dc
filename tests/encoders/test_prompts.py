"""Prompt templates and class names in them."""

from __future__ import annotations

import pytest

from zepad_mm.encoders.prompts import clean_name, templates_of


def test_templates_of_and_clean_name() -> None:
    assert templates_of("single") == ("a photo of a {}.",)
    assert templates_of("a {}") == ("a {}",)
    assert clean_name(" T_shirt  red") == "T shirt red"
    with pytest.raises(ValueError, match="the list is empty"):
        templates_of([])
