"""Registries of named implementations."""

from __future__ import annotations

import pytest

from zepad_mm.utils.registry import Registry


def test_registry_errors_suggest_names() -> None:
    registry: Registry[int] = Registry("number")
    registry.register("one")(1)
    with pytest.raises(ValueError, match="registered already"):
        registry.register("one")(2)
    with pytest.raises(ValueError, match="unknown number 'onne'; did you mean 'one'"):
        registry.get("onne")
    assert list(registry) == ["one"]
    assert "two" not in registry
