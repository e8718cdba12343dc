"""The build of a CLIP from WordNet's nouns: its reader, prototypes, tokenizer, and all steps on random images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import open_clip
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features
from PIL import Image
from timm.data import ImageNetInfo

from tools.wordnet_clip import build, images, model, names
from tools.wordnet_clip.record import export, result_page
from tools.wordnet_clip.tokenizer import build_tokenizer, choose_merges
from tools.wordnet_clip.training import Recipe
from tools.wordnet_clip.wordnet import WordNet
from zepad_mm.encoders import load_clip
from zepad_mm.utils.io import read_json

# lemma and parent
NOUNS = (
    ("entity", None), ("thing", "entity"), ("animal", "entity"), ("fish", "animal"), ("salmon", "fish"),
    ("reef", "entity"), ("clothing", "entity"), ("footwear", "clothing"), ("headdress", "clothing"),
    ("garment", "clothing"), ("neckwear", "clothing"), ("person", "entity"), ("face", "entity"),
    ("ewer", "thing"),
)  # fmt: skip
ABOVE = {"fish": range(10), "clothing": range(10, 20), "person": range(20, 22)}  # ImageNet classes; the rest: "thing"
RECIPE = Recipe(
    image_size=32, text_steps=3, text_batch=40, finish_steps=2, finish_batch=12, names_per_step=10, nouns_per_step=40
)


def write_wordnet(folder: Path) -> None:
    """A few nouns above ImageNet's 1,000 classes, in the format of WordNet 3.0."""
    info = ImageNetInfo()
    offset_of = {noun: 90_000_000 + number for number, (noun, _) in enumerate(NOUNS)}
    synsets = [
        (offset_of[noun], noun, parent if parent is None else offset_of[parent], f"what is called {noun}")
        for noun, parent in NOUNS
    ]
    for index in range(1000):
        lemma = info.index_to_description(index, detailed=False).split(",")[0].replace(" ", "_")
        parent = next((noun for noun, classes in ABOVE.items() if index in classes), "thing")
        synsets.append((int(info.index_to_label_name(index)[1:]), lemma, offset_of[parent], "a class"))
    data, senses = ["  1 the licence"], {}
    for offset, lemma, above, gloss in synsets:
        pointers = "000" if above is None else f"001 @ {above:08d} n 0000"
        data.append(f'{offset:08d} 03 n 01 {lemma} 0 {pointers} | {gloss}; "an example"')
        senses.setdefault(lemma.lower(), []).append(offset)
    index = ["  1 the licence"]
    for lemma, offsets in senses.items():
        index.append(f"{lemma} n {len(offsets)} 1 @ {len(offsets)} 0 " + " ".join(f"{o:08d}" for o in offsets))
    folder.mkdir()
    (folder / "data.noun").write_text("\n".join(data) + "\n", encoding="latin-1")
    (folder / "index.noun").write_text("\n".join(index) + "\n", encoding="latin-1")
    (folder / "cntlist.rev").write_text("fish%1:05:00:: 1 7\nfish%2:35:00:: 1 3\n", encoding="latin-1")


def write_set(folder: Path, class_names: list[str], n: int) -> None:
    """Random images as a parquet data set with three splits."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=class_names)})
    for split in ("train", "validation", "test"):
        shown = [Image.fromarray(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)) for _ in range(n)]
        columns = {"image": shown, "label": [row % len(class_names) for row in range(n)]}
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def nouns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nouns") / "wordnet"
    write_wordnet(folder)
    return folder


@pytest.fixture(scope="module")
def wordnet(nouns: Path) -> WordNet:
    return WordNet(nouns)


def test_wordnet_reads_nouns(wordnet: WordNet) -> None:
    fish = wordnet.senses["fish"][0]
    synset = wordnet.synsets[fish]
    assert (synset.lemmas, synset.gloss) == (("fish",), "what is called fish")
    assert wordnet.below[fish] == frozenset(range(10))
    assert wordnet.counts == {"fish": 7}
    assert {wordnet.synsets[offset].lemmas[0]: steps for offset, steps in wordnet.ancestors(fish).items()} == {
        "fish": 0,
        "animal": 1,
        "entity": 2,
    }


def test_wordnet_prototype_is_below_noun_or_its_nearest_ancestor(wordnet: WordNet) -> None:
    prototypes = {noun: wordnet.prototype(wordnet.senses[noun][0]) for noun in ("fish", "salmon", "thing", "reef")}
    fish, salmon = prototypes["fish"], prototypes["salmon"]
    assert fish is not None
    assert (fish.classes, fish.steps) == (tuple(range(10)), 0)
    assert salmon is not None
    assert (salmon.classes, salmon.steps) == (tuple(range(10)), 1)
    assert prototypes["thing"] is None, "above too many classes to say anything"
    assert prototypes["reef"] is None, "its ancestors are above too many"
    assert wordnet.look_up("wild salmons") == (wordnet.senses["salmon"][0], salmon)
    assert wordnet.look_up("unknown") is None


def test_wordnet_without_files_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="apt-get install wordnet-base"):
        WordNet(tmp_path)


def test_tokenizer_reads_back_texts() -> None:
    texts = ["a photo of a salmon.", "it's 2 dogs!", "naïve zebra"]
    merges = choose_merges(Counter({"photo": 3.0, "salmon": 2.0, "of": 1.0}), 700)
    tokenizer = build_tokenizer(merges, 24)
    rows = tokenizer.encode_batch(texts)
    assert [len(row.ids) for row in rows] == [24] * len(texts)
    assert "salmon</w>" in rows[0].tokens
    assert "zebra</w>" not in rows[2].tokens
    for text, row in zip(texts, rows, strict=True):
        end = row.ids.index(max(row.ids))
        read = tokenizer.decode(row.ids[1:end]).replace("</w>", "").replace(" ", "")
        assert read == text.replace(" ", "")


@pytest.fixture(scope="module")
def built(nouns: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Work folder and finished CLIP of a build in a few steps, from random weights and random images."""
    root = tmp_path_factory.mktemp("build")
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    weights = {name: tensor for name, tensor in network.items() if "num_batches" not in name}
    write_set(root / "data" / "caltech69", ["salmon", "sock", "garden gnome", "ewer"], 24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "image_tower_weights", lambda: weights)
        for module in (images, build):
            patch.setattr(module, "PACKED", {"caltech69": (100, 0)})
        patch.setattr(names, "VOCABULARY", 1000)
        patch.setitem(model.TEXT_TOWER, "vocab_size", 1000)
        work = root / "work"
        work.mkdir()
        build.prepare(root / "data", nouns, work)
        build.train(work, RECIPE, "cpu")
        export(work, root / "data", root / "clip")
    return work, root / "clip"


def test_build_writes_clip_that_open_clip_loads(built: tuple[Path, Path]) -> None:
    _, folder = built
    source = f"local-dir:{folder}"
    clip = open_clip.create_model(source, precision="fp32").eval()
    tokens = open_clip.get_tokenizer(source)(["a photo of a salmon."])
    encoder, text = load_clip(f"open_clip:{source}")
    shown = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        embedding = torch.nn.functional.normalize(clip.encode_text(tokens), dim=-1)
        assert torch.allclose(
            torch.nn.functional.normalize(text(["a photo of a salmon."]), dim=-1), embedding, atol=1e-5
        )
        assert encoder(shown).shape == (2, model.EMBED)
        assert torch.isfinite(encoder(shown)).all()
    assert encoder.preprocess.image_size == RECIPE.image_size


def test_build_records_what_it_read(built: tuple[Path, Path]) -> None:
    work, folder = built
    record = read_json(folder / "build.json")
    assert set(record["seconds"]) == {"text", "finish-0", "finish-1"}
    assert record["training_images"] == {"caltech69": 18}, "no image of a class that is never read"
    words = read_json(work / "texts.json")["words"]
    assert "salmon" in words
    assert not any("ewer" in word.split() for word in words)
    titles = [row["data"] for row in record["rows"]]
    assert titles[0] == "caltech69 test, 69 names"
    assert "caltech69 test, 1 names never read, among these" in titles
    assert "| caltech69 test, 69 names" in result_page(record)
    assert (folder / "README.md").read_text().startswith("# The CLIP that reads WordNet's nouns")
