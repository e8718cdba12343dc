"""The registry of threat models: every entry is complete, and other modules agree with it."""

from __future__ import annotations

import pytest

from zepad_mm.evaluation import PRESETS, THREATS, EvalSettings
from zepad_mm.evaluation.engine import STAGES
from zepad_mm.evaluation.threats import ATTACKS, strength, threat_model


def test_threats_have_the_keys_of_files_from_weak_to_strong() -> None:
    assert list(THREATS) == ["clean", "T1", "T1p", "T1b", "T1i", "T1ib", "T2", "T3"]
    assert [strength(key) for key in (*THREATS, "T9")] == list(range(9))


@pytest.mark.parametrize("threat", ATTACKS, ids=str)
def test_threat_model_is_complete(threat: object) -> None:
    model = THREATS[str(threat)]
    assert model.key in STAGES
    assert model.title.startswith(f"{model.key}: ")
    assert model.description
    assert model.attacker
    assert model.key in model.counts
    assert set(model.counts) <= set(THREATS)
    assert model.attacks(PRESETS.get("full"))
    assert model.budget is not None
    assert model.budget(EvalSettings(epsilon=1 / 255))[0] > 0


def test_threat_model_suggests_the_nearest_key() -> None:
    with pytest.raises(ValueError, match="unknown threat 'T2b'; did you mean"):
        threat_model("T2b")
