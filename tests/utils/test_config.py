"""Settings: strict dictionaries, checked choices, files and command lines."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import pytest

import zepad_mm
from zepad_mm.utils.config import Config, literal_fields
from zepad_mm.utils.text import parser_message


@dataclass(frozen=True, kw_only=True)
class Part(Config):
    kind: Literal["large", "small"] = "small"


@dataclass(frozen=True, kw_only=True)
class Settings(Config):
    name: str
    rate: float = 0.1
    mode: Literal["train", "eval"] | None = None
    part: Part = field(default_factory=Part)
    sizes: tuple[int, ...] = ()
    dry: bool = field(default=False, metadata={"flag": "write nothing"})


@dataclass(frozen=True, kw_only=True)
class Inner(Config):
    rate: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Outer(Config):
    name: str
    sizes: tuple[int, ...] = (1,)
    inner: Inner = field(default_factory=Inner)
    limit: float | None = None
    layers: int | str | None = None


def test_config_is_strict() -> None:
    config = Outer(name="a", sizes=(1, 2), inner=Inner(rate=1.0), limit=3.0)
    assert Outer.from_dict(config.to_dict()) == config
    assert Outer.from_dict({"name": "a", "inner": {"rate": 1}}).inner.rate == 1.0
    assert [Outer.from_dict({"name": "a", "layers": v}).layers for v in (3, "last", None)] == [3, "last", None]
    for bad, message in (
        ({"name": "a", "inner": {"raet": 1}}, "Inner has no key 'raet'; did you mean 'rate'"),
        ({}, "lacks the keys 'name'"),
        ({"name": 3}, "wants str"),
        ({"name": "a", "layers": 1.5}, "wants int"),
        ({"name": "a", "sizes": "12"}, "wants a list"),
        ({"name": "a", "inner": {"rate": "1e-3"}}, "wants float"),
        ({"name": "a", "inner": 3}, "wants a dictionary"),
    ):
        with pytest.raises(ValueError, match=message):
            Outer.from_dict(bad)


def test_config_names_key_value_choices_and_nearest_spelling() -> None:
    with pytest.raises(ValueError, match=r"kind: expected one of large, small, got 'smal'; did you mean 'small'\?"):
        Part(kind="smal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode: expected one of train, eval, None, got 'test'"):
        replace(Settings(name="a"), mode="test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind: expected one of large, small, got 3"):
        Settings.from_dict({"name": "a", "part": {"kind": 3}})
    assert Settings(name="a", mode=None).mode is None


def subclasses() -> list[type[Config]]:
    """Every settings class of the package that has a choice among its fields."""
    for module in pkgutil.walk_packages(zepad_mm.__path__, "zepad_mm."):
        if "__main__" not in module.name and "pretraining" not in module.name and "serve" not in module.name:
            importlib.import_module(module.name)
    found, waiting = [], [Config]
    while waiting:
        children = waiting.pop().__subclasses__()
        waiting += children
        found += [child for child in children if child.__module__.startswith("zepad_mm") and literal_fields(child)]
    return sorted(found, key=lambda cls: cls.__qualname__)


@pytest.mark.parametrize("cls", subclasses(), ids=lambda cls: cls.__name__)
def test_every_choice_of_every_config_is_checked(cls: type[Config]) -> None:
    required: dict[str, Any] = {
        "mean": (0.5,) * 3, "std": (0.5,) * 3, "image_size": 8, "public_source": "open_clip:embedded", "branches": (),
        "class_names": ("cat",), "name": "tecoa", "source": "open_clip:embedded",
    } | {name: choices[0] for name, choices in literal_fields(cls).items()}  # fmt: skip
    needed = {f.name: required[f.name] for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    for name in literal_fields(cls):
        with pytest.raises(ValueError, match=f"^{name}: expected one of .*, got 'nothing'"):
            cls(**needed | {name: "nothing"})


def test_from_cli_reads_a_file_and_options(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("name: file\nrate: 2\npart:\n  kind: large\nsizes: [1, 2]\n")
    expected = Settings(name="file", rate=2.0, part=Part(kind="large"), sizes=(1, 2))
    assert Settings.from_cli(["--config", str(path)]) == expected
    changed = Settings.from_cli(["--config", str(path), "--part.kind", "small", "--name", "option", "--dry"])
    assert changed == replace(expected, name="option", part=Part(kind="small"), dry=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part.kind", "smal"], "smal"),
        (["--part.kinds", "small"], "part.kinds"),
        (["--rate", "fast"], "rate: expected float, got fast"),
    ],
)
def test_from_cli_names_what_is_wrong(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Settings.from_cli(["--name", "a", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "the key 'name' stands twice, in the lines 1 and 2"),
        ("name: a\npart: {kind: small, kind: large}\n", "the key 'kind' stands twice"),
        ("name: a\nprat: {}\n", "unknown key 'prat'; did you mean"),
        ("name: a\npart: &a {kind: *a}\n", "line 2: expected values, got one nested without end"),
    ],
)
def test_from_cli_reads_each_key_once(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(SystemExit):
        Settings.from_cli(["--config", str(tmp_path / "settings.yaml")])
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1  # no usage


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Parser key \"top\": Expected a <class 'int'>. Got value: x", "top: expected int, got x"),
        (
            'Parser key "a.steps":\n  Does not validate against any of the Union subtypes\n  Subtypes: [<class '
            "'int'>, <class 'NoneType'>]\n  Errors:\n    - Expected a <class 'int'>\n  Given value: ten",
            "a.steps: expected int, null, got ten",
        ),
        (
            "Parser key \"p\": Does not validate against any of the Union subtypes Subtypes: [typing.Literal['no', "
            "'x'], <class 'NoneType'>] Errors: - E Given value type: b Given value: False",
            "p: expected 'no', 'x', null, got False; YAML reads no, off, yes and on as booleans: write them in quotes",
        ),
        ("the following arguments are required: classify.labels", "the following arguments are required: --labels"),
    ],
)
def test_messages_of_the_parser_are_plain(text: str, plain: str) -> None:
    assert parser_message(text) == plain


def test_from_cli_prints_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Settings.from_cli(["--name", "a", "--print_config"])
    assert "kind: small" in capsys.readouterr().out
