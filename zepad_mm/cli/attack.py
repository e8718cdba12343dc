"""``zepad attack``: craft a universal perturbation on one or several encoders."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from zepad_mm.cli.common import DATA, SOURCE, Command, budget, print_result
from zepad_mm.utils.config import Config
from zepad_mm.utils.locks import output_folder

if TYPE_CHECKING:
    from zepad_mm.attacks import Perturbation


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class AttackSettings(Config):
    """Settings of ``zepad attack``; each field is an option."""

    encoders: tuple[str, ...] = _option((), f"{SOURCE}; with several, their losses are averaged")
    attack: str = _option("feature_uap", "name of a universal attack; an unknown name lists all")
    data: str = _option("embedded", f"the attacker's unlabelled images: {DATA}")
    split: str | None = _option(None, 'split of the data (default: "surrogate" for embedded, else "train")')
    eps: str | float | None = _option(
        None, "budget, e.g. 10/255; of a patch its share of the area (default: the attack's)"
    )
    n: int | None = _option(1000, "number of images; null in a config file: all")
    steps: int | None = _option(None, "optimiser steps (default: the attack's)")
    image_size: int | None = _option(
        None, "side of the perturbation in pixels; it is resized to images of another size (default: the encoder's)"
    )
    seed: int = _option(0, "seed of all randomness")
    out: str = _option("outputs/perturbation.safetensors", "file to write, or a folder for ATTACK.safetensors and .png")

    def __post_init__(self) -> None:
        if not self.encoders:
            raise ValueError("encoders: expected at least one source, e.g. zepad attack open_clip:embedded")

    @property
    def path(self) -> Path:
        """The file of the perturbation."""
        out = output_folder(self.out)
        return out if out.suffix == ".safetensors" else out / f"{self.attack}.safetensors"


def craft(settings: AttackSettings, progress: bool = True) -> Perturbation:
    """Craft a perturbation and save it with its provenance; in a folder also as a PNG magnified to the full range."""
    import torch
    from torchvision.utils import save_image

    from zepad_mm.attacks import UNIVERSAL_ATTACKS
    from zepad_mm.data import load_data
    from zepad_mm.encoders import load_encoder
    from zepad_mm.utils.atomic import check_writable

    attack = UNIVERSAL_ATTACKS.get(settings.attack)(seed=settings.seed)
    if settings.eps is not None:
        attack = replace(attack, epsilon=budget(str(settings.eps)))
    if settings.steps is not None:
        attack = replace(attack, steps=settings.steps)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoders = {source: load_encoder(source).to(device) for source in settings.encoders}
    check_writable(settings.path)  # before minutes of work, and after what is refused without any
    split = settings.split or ("surrogate" if settings.data == "embedded" else "train")
    resize = next(iter(encoders.values())).preprocess.at(settings.image_size)
    attack = replace(attack, image_size=resize.image_size)
    data = load_data(settings.data, split, resize, settings.n, settings.seed, labelled=False)
    perturbation = attack.fit(encoders, data.images.to(device), progress=progress)
    perturbation.save(settings.path)
    if settings.path != Path(settings.out):
        delta = perturbation.delta
        magnified = delta if attack.norm == "patch" else 0.5 + delta / (2 * attack.epsilon)
        save_image(magnified, settings.path.with_suffix(".png"))
    return perturbation


def _declare(parser: Any) -> None:
    parser.add_argument("--config", action="config", help="YAML file with the settings; options after it override it")
    hints = get_type_hints(AttackSettings)
    parser.add_argument("encoder", nargs="*", type=str, help="the same as --encoders, e.g. open_clip:embedded")
    for setting in fields(AttackSettings):
        name, text = "--" + setting.name.replace("_", "-"), setting.metadata["help"]
        kind = hints[setting.name]
        kind = kind | str if setting.name == "encoders" else kind  # one needs no brackets
        parser.add_argument(name, type=kind, default=setting.default, help=text)


def _run(options: Any) -> int:
    values = {setting.name: getattr(options, setting.name) for setting in fields(AttackSettings)}
    encoders = options.encoder or options.encoders
    values["encoders"] = [encoders] if isinstance(encoders, str) else encoders
    settings = AttackSettings.from_dict(values)
    perturbation = craft(settings, progress=not options.quiet)
    about = {"out": str(settings.path), "epsilon": perturbation.epsilon, **perturbation.provenance}
    print_result(options, about, f"Written: {settings.path} ({perturbation!r})")
    return 0


ATTACK = Command(
    about="Craft a universal perturbation on one or several encoders.",
    example="zepad attack open_clip:embedded --attack feature_uap --eps 10/255 --out perturbation.safetensors",
    declare=_declare,
    run=_run,
)
