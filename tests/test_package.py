"""The top level of the package."""

from __future__ import annotations

import subprocess
import sys

import pytest

import zepad_mm


def test_top_level_import_is_lazy() -> None:
    code = (
        "import sys, zepad_mm; "
        "heavy = {'torch', 'transformers', 'open_clip', 'timm', 'datasets', 'peft'} & set(sys.modules); "
        "assert not heavy, heavy; assert zepad_mm.__version__; assert 'ZePAD' in dir(zepad_mm)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    for name in zepad_mm.__all__:
        assert getattr(zepad_mm, name) is not None
    with pytest.raises(AttributeError, match="public names"):
        zepad_mm.Zepad  # noqa: B018
