"""Named prompt sets and the clean-up of class names, for zero-shot heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from string import Formatter

from zepad_mm.utils.names import clean_name
from zepad_mm.utils.registry import Registry

__all__ = ["PROMPTS", "clean_name", "templates_of"]

PROMPTS: Registry[tuple[str, ...]] = Registry("prompt set")

PROMPTS.register("single")(("a photo of a {}.",))
PROMPTS.register("transformers")(("This is a photo of {}.",))
PROMPTS.register("photo")(
    (
        "a photo of a {}.",
        "a picture of a {}.",
        "a photo of the {}.",
        "a cropped photo of a {}.",
        "a close-up photo of a {}.",
        "a {}.",
    )
)
PROMPTS.register("style")(
    ("a {}.", "a photo of a {}.", "a drawing of a {}.", "a painting of a {}.", "a sketch of a {}.", "a cartoon {}.")
)


def templates_of(prompts: str | Sequence[str]) -> tuple[str, ...]:
    """The templates of a named set, or the ones given. Raises ValueError for a template without ``{}``."""
    if isinstance(prompts, str):
        prompts = (prompts,) if "{" in prompts else PROMPTS.get(prompts)
    if not isinstance(prompts, Iterable) or not all(isinstance(template, str) for template in prompts):
        raise ValueError(
            f"prompts: expected a named set ({', '.join(PROMPTS)}), a template such as 'a photo of a {{}}.' or several "
            f"of them, got {prompts!r:.100}"
        )
    for template in prompts:
        if not _has_one_place(template):
            raise ValueError(f"prompt template {template!r}: expected exactly one '{{}}', e.g. 'a photo of a {{}}.'")
    if not prompts:
        raise ValueError(f"prompts: the list is empty; give templates or a named set: {', '.join(PROMPTS)}")
    return tuple(prompts)


def _has_one_place(template: str) -> bool:
    """Whether ``template.format(name)`` puts the name in one place, and asks for nothing else."""
    try:
        fields = [field for _, *field in Formatter().parse(template) if field[0] is not None]
    except ValueError:  # a lone brace
        return False
    return fields == [["", "", None]]
