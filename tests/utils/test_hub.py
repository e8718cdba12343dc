"""Push and fetch with the real client of the Hub against a local server: round trips and error messages."""

from __future__ import annotations

import ast
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants, parse_eval_result_entries

from tests.helpers.documents import DOCUMENTS, blocks
from tests.helpers.hub_server import Hub, environment, reached_through, running_hub
from tests.helpers.models import CLASSES, TINY_CLIP, make_zepad, write_clip
from tests.helpers.webdatasets import webdataset
from zepad_mm import RobustZeroShotClassifier, load_encoder
from zepad_mm.attacks import Perturbation
from zepad_mm.evaluation import EvalData, EvalSettings, Records, Report, evaluate, fetch_report, push_report
from zepad_mm.evaluation.model_card import eval_result_files, model_card
from zepad_mm.models.branch import Branch, BranchConfig
from zepad_mm.models.heads import HEADS
from zepad_mm.models.zepad import ZePAD, ZePADConfig
from zepad_mm.utils.hub import fetch, push_folder

BASE = "open_clip:hf-hub:acme/tiny-clip"
OWNER, GUEST = "hf_OwnerSecretOwnerSecret", "hf_GuestSecretGuestSecret"


@pytest.fixture
def hub(tmp_path: Path, clip_source: str) -> Iterator[Hub]:
    """A Hub with a small CLIP on it, and this process's client pointed at it with an empty cache."""
    with running_hub() as running, reached_through(running, tmp_path / "cache"):
        running.tokens = {OWNER: "acme", GUEST: "guest"}
        running.put("acme/tiny-clip", Path(clip_source.rpartition(":")[2]))
        yield running


@pytest.fixture
def model(hub: Hub) -> ZePAD:
    return make_zepad(BASE)


@pytest.fixture
def published(hub: Hub, model: ZePAD) -> ZePAD:
    """The model, and its files at acme/defended."""
    model.push_to_hub("acme/defended", token=OWNER)
    hub.seen.clear()
    return model


def same(loaded: ZePAD, model: ZePAD) -> bool:
    """Bit for bit: every tensor, of the base encoders too."""
    ours, theirs = model.state_dict(), loaded.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# ---- there and back ------------------------------------------------------------------------------------------------


def test_push_and_load_round_trip(hub: Hub, published: ZePAD, images: torch.Tensor, tmp_path: Path) -> None:
    loaded = ZePAD.from_pretrained("acme/defended", cache_dir=tmp_path / "elsewhere")
    assert same(loaded, published)
    assert torch.equal(loaded.decide(images).logits, published.decide(images).logits)
    assert replace(loaded.config, fingerprint=(), encoders={}) == published.config
    files = hub.files("acme/defended")
    assert {Path(name).suffix for name in files if name != ".gitattributes"} == {".json", ".md", ".safetensors"}
    base = len(hub.files("acme/tiny-clip")["open_clip_model.safetensors"])
    assert sum(map(len, files.values())) < base / 10  # of the bases nothing is stored but what was tuned
    data = ModelCard(files["README.md"].decode()).data
    assert (data.library_name, data.base_model) == ("zepad-mm", ["acme/tiny-clip"])
    assert 'from_pretrained("acme/defended")' in files["README.md"].decode()
    assert not (tmp_path / "cache" / "models--acme--defended").exists()


def test_second_push_replaces_the_first(hub: Hub, published: ZePAD, images: torch.Tensor) -> None:
    before = hub.repos["acme/defended"].find("main")
    published.push_to_hub("acme/defended", token=OWNER)
    assert hub.repos["acme/defended"].find("main") == before  # nothing new, no commit
    kept = [published.branch(name) for name in ("full", "benign")]
    smaller = ZePAD(replace(published.config, branches=tuple(branch.config for branch in kept)), kept)
    smaller.push_to_hub("acme/defended", token=OWNER, card="---\nlibrary_name: zepad-mm\n---\nmy own card")
    assert not [name for name in hub.files("acme/defended") if name.startswith("branches/")]
    assert hub.files("acme/defended")["README.md"].endswith(b"my own card")
    assert same(ZePAD.from_pretrained("acme/defended"), smaller)
    assert same(ZePAD.from_pretrained("acme/defended", revision=before), published)


def test_branches_and_commits(hub: Hub, published: ZePAD) -> None:
    other = published.set_fusion("equal")
    other.push_to_hub("acme/defended", token=OWNER, branch="equal")
    assert ZePAD.from_pretrained("acme/defended").config.fusion == "bounded_benign"
    assert ZePAD.from_pretrained("acme/defended", revision="equal").config.fusion == "equal"
    with pytest.raises(FileNotFoundError, match="revision 'v9' does not exist; a revision is a branch, a tag"):
        ZePAD.from_pretrained("acme/defended", revision="v9")
    with pytest.raises(ValueError, match="has no revisions"):
        ZePAD.from_pretrained("embedded", revision="v1")


def test_classifier_loads_from_the_hub(hub: Hub, published: ZePAD, images: torch.Tensor) -> None:
    hub.repos["acme/defended"].private = hub.repos["acme/tiny-clip"].private = True
    classifier = RobustZeroShotClassifier.from_pretrained("acme/defended", token=OWNER)
    # other labels need the text tower, long after the token was given
    answer = classifier(images, ["a cat", "a dog"], return_evidence=True)
    assert {one["label"] for one in answer[0]["labels"]} == {"a cat", "a dog"}


# ---- bases, by revision --------------------------------------------------------------------------------------------


def write_clip_repository(folder: Path, seed: int) -> None:
    folder.mkdir()
    write_clip(folder, seed)


def write_timm_repository(folder: Path, seed: int) -> None:
    import timm

    torch.manual_seed(seed)
    backbone = timm.create_model("test_vit", num_classes=10)
    timm.models.save_for_hf(backbone, folder, model_config={"num_classes": 10}, safe_serialization=True)


def write_dinov2_repository(folder: Path, seed: int) -> None:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    size = {"image_size": 28, "patch_size": 14, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**size)).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)


def write_hf_clip_repository(folder: Path, seed: int) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = {**size, "vocab_size": 64}, {**size, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


def write_ssl_repository(folder: Path, seed: int, name: str = "moco.pth") -> None:
    """A ResNet in the layout of the official MoCo."""
    import torchvision

    torch.manual_seed(seed)
    folder.mkdir()
    network = torchvision.models.resnet18()
    state = {f"module.encoder_q.{key}": value for key, value in network.state_dict().items() if key[:3] != "fc."}
    torch.save({"state_dict": state, "arch": "resnet18"}, folder / name)


# source -> its name on the Hub, and what writes such a repository; one line for each way a base is named
BASES: dict[str, tuple[str, Callable[[Path, int], None]]] = {
    "open_clip:hf-hub:acme/clip": ("acme/clip", write_clip_repository),
    "open_clip:tiny/v1": ("acme/clip", write_clip_repository),
    "timm:hf-hub:acme/vit": ("acme/vit", write_timm_repository),
    "timm:test_vit.r160_in1k": ("timm/test_vit.r160_in1k", write_timm_repository),
    "hf:acme/dinov2": ("acme/dinov2", write_dinov2_repository),
    "hf:acme/hf-clip": ("acme/hf-clip", write_hf_clip_repository),
}


@pytest.fixture
def tiny_tag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A small model in open_clip's own table of names and tags, whose real entries are all large."""
    import open_clip
    from open_clip import factory, pretrained

    (tmp_path / "tiny.json").write_text(json.dumps(TINY_CLIP["model_cfg"]))
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    open_clip.add_model_config(tmp_path / "tiny.json")
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", {"v1": pretrained._pcfg(hf_hub="acme/clip/")})


def headed(source: str) -> ZePAD:
    """One branch, the base as it is, with a small head."""
    encoder = load_encoder(source)
    torch.manual_seed(0)
    head = HEADS.get("linear")(encoder.feature_dim, len(CLASSES))
    config = BranchConfig(name="one", role="benign", source=source, head="linear")
    about = ZePADConfig(public_source=source, branches=(config,), class_names=CLASSES)
    return ZePAD(about, [Branch(config, encoder, head)])


@pytest.mark.usefixtures("tiny_tag")
@pytest.mark.parametrize("source", BASES)
def test_base_encoder_loads_at_its_recorded_revision(hub: Hub, source: str, tmp_path: Path) -> None:
    """Its owner publishes other weights under the same name; the defended model still answers as before."""
    name, write = BASES[source]
    write(tmp_path / "first", 0)
    hub.put(name, tmp_path / "first")
    model = headed(source)
    commit = hub.repos[name].find("main")
    assert model.config.revisions == {source: commit}
    model.push_to_hub("acme/defended", token=OWNER)
    write(tmp_path / "second", 1)
    hub.put(name, tmp_path / "second")
    loaded = ZePAD.from_pretrained("acme/defended", cache_dir=tmp_path / "elsewhere")
    assert same(loaded, model)
    assert loaded.config.revisions == {source: commit}
    assert loaded.branch("one").encoder.source == source
    assert not same(headed(source), model)  # by name alone it is the new one
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert json.loads((again / "config.json").read_text())["revisions"] == {source: commit}

    del hub.repos[name].commits[commit or ""]
    with pytest.raises(FileNotFoundError, match=re.escape(f"{name} at revision '{commit}' does not exist")):
        ZePAD.from_pretrained("acme/defended", cache_dir=tmp_path / "third")


def test_base_of_unknown_revision_is_checked_by_fingerprint(hub: Hub, published: ZePAD, tmp_path: Path) -> None:
    config = json.loads(hub.files("acme/defended")["config.json"])
    del config["revisions"]
    hub.put("acme/old", {**hub.files("acme/defended"), "config.json": json.dumps(config).encode()})
    assert same(ZePAD.from_pretrained("acme/old"), published)
    write_clip_repository(tmp_path / "other", 1)
    hub.put("acme/tiny-clip", tmp_path / "other")
    with pytest.raises(ValueError, match="answers a fixed image differently"):
        ZePAD.from_pretrained("acme/old")


# ---- what goes wrong on the way ------------------------------------------------------------------------------------


def test_interrupted_download_resumes(
    hub: Hub, published: ZePAD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    hub.cut = {"model.safetensors": 50_000, "open_clip_model.safetensors": 1_000_000}
    assert same(ZePAD.from_pretrained("acme/defended", cache_dir=tmp_path / "elsewhere"), published)
    for name, cut in (("model.safetensors", 50_000), ("open_clip_model.safetensors", 1_000_000)):
        first, then = hub.downloads(name)
        assert first is None
        start = int(re.fullmatch(r"bytes=(\d+)-", then or "")[1])  # type: ignore[index]
        assert 0 < start <= cut  # what had come was not fetched again
        assert start > cut - 4096


def test_failed_download_keeps_finished_files(hub: Hub, published: ZePAD, tmp_path: Path) -> None:
    """A shorter file than promised ends the download with an error; the next one resumes there."""
    cache = tmp_path / "elsewhere"
    hub.replaced["model.safetensors"] = b"short"
    with pytest.raises(ValueError, match=r"acme/defended is damaged: .* another size .* fetch it again"):
        ZePAD.from_pretrained("acme/defended", cache_dir=cache)
    hub.replaced.clear()
    assert same(ZePAD.from_pretrained("acme/defended", cache_dir=cache), published)
    assert len(hub.downloads("config.json")) == 1
    assert not list(cache.rglob("*.incomplete"))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("acme/defended", "model.safetensors"),
        ("acme/defended", "branches/lora/adapter_model.safetensors"),
        ("acme/defended", "config.json"),
        ("acme/tiny-clip", "open_clip_model.safetensors"),
    ],
)
def test_fetch_detects_wrong_bytes(hub: Hub, published: ZePAD, tmp_path: Path, name: str, file: str) -> None:
    """Of the right length and in a valid file: the client itself does not notice."""
    cache = tmp_path / "elsewhere"
    good = hub.files(name)[file]
    hub.replaced[file] = good[:-2] + bytes([good[-2] ^ 1]) + good[-1:]
    message = rf"{re.escape(file)} of {name} is damaged: .* checksum .* force_download=True"
    with pytest.raises(ValueError, match=message):
        ZePAD.from_pretrained("acme/defended", cache_dir=cache)
    hub.replaced.clear()
    with pytest.raises(ValueError, match=message):  # it lies in the cache now
        ZePAD.from_pretrained("acme/defended", cache_dir=cache)
    assert same(ZePAD.from_pretrained("acme/defended", cache_dir=cache, force_download=True), published)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "branches/lora/adapter_model.safetensors"])
def test_fetch_names_a_missing_file(hub: Hub, published: ZePAD, file: str) -> None:
    files = hub.files("acme/defended")
    hub.put("acme/torn", {name: data for name, data in files.items() if name != file})
    with pytest.raises(FileNotFoundError, match=re.escape(file)):
        ZePAD.from_pretrained("acme/torn")


def test_base_without_weights_is_an_error(hub: Hub, published: ZePAD, tmp_path: Path) -> None:
    config = json.loads(hub.files("acme/defended")["config.json"])
    bare = {key: data for key, data in hub.files("acme/tiny-clip").items() if key.endswith(".json")}
    config["revisions"] = {BASE: hub.put("acme/tiny-clip", bare)}
    hub.put("acme/defended", {**hub.files("acme/defended"), "config.json": json.dumps(config).encode()})
    with pytest.raises(FileNotFoundError, match=r"acme/tiny-clip .* holds no weights: expected one of open_clip_model"):
        ZePAD.from_pretrained("acme/defended")


@pytest.mark.parametrize("kind", ["open_clip:hf-hub:", "timm:hf-hub:", "hf:"])
def test_load_encoder_has_the_same_errors(hub: Hub, kind: str) -> None:
    """And is never built with random weights because its own were not found."""
    files = {"open_clip_config.json": json.dumps(TINY_CLIP).encode(), "config.json": b"{}"}
    hub.put("acme/bare", files)
    with pytest.raises(FileNotFoundError, match=r"acme/bare .* holds no weights"):
        load_encoder(f"{kind}acme/bare")
    with pytest.raises(PermissionError, match="acme/nothing is private or does not exist"):
        load_encoder(f"{kind}acme/nothing")


@pytest.mark.parametrize("name", ["acme/nothing/here", "./no-folder", "no folder", "/tmp/no/folder"])
def test_invalid_repository_names(hub: Hub, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither a folder here nor a name on the Hub.*owner/name"):
        ZePAD.from_pretrained(name)


# ---- offline -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["local_files_only", "HF_HUB_OFFLINE", "server gone"])
def test_offline_errors_name_the_reason(
    hub: Hub, published: ZePAD, way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ZePAD.from_pretrained("acme/defended")
    asked = len(hub.seen)
    only = way == "local_files_only"
    if way == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if way == "server gone":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    loaded = ZePAD.from_pretrained("acme/defended", local_files_only=only)
    assert same(loaded, published)
    loaded.set_classes(["cat", "dog"])  # the text tower too
    reason = {"server gone": "the Hub cannot be reached"}.get(way, f"{way}.* is set")
    with pytest.raises(FileNotFoundError, match=rf"acme/defended is not.* in the cache .*/empty, and {reason}"):
        ZePAD.from_pretrained("acme/defended", cache_dir=tmp_path / "empty", local_files_only=only)
    with pytest.raises(FileNotFoundError, match="acme/unseen is not"):
        ZePAD.from_pretrained("acme/unseen", local_files_only=only)
    assert len(hub.seen) == asked
    if not only:
        with pytest.raises(ConnectionError, match="acme/defended is out of reach"):
            published.push_to_hub("acme/defended", token=OWNER)


def test_offline_with_an_incomplete_cache(hub: Hub, published: ZePAD, tmp_path: Path) -> None:
    """The model is there, its base is not; or the model is there but for one file."""
    cache = tmp_path / "elsewhere"
    fetch("acme/defended", ["*"])
    assert ZePAD.from_pretrained("acme/defended", cache_dir=cache) is not None
    for blob in (cache / "models--acme--tiny-clip").rglob("open_clip_model.safetensors"):
        blob.unlink()
    with pytest.raises(FileNotFoundError, match=r"acme/tiny-clip .*local_files_only"):
        ZePAD.from_pretrained("acme/defended", cache_dir=cache, local_files_only=True)
    for blob in (cache / "models--acme--defended").rglob("model.safetensors"):
        blob.unlink()
    with pytest.raises(FileNotFoundError, match=r"acme/defended"):
        ZePAD.from_pretrained("acme/defended", cache_dir=cache, local_files_only=True)


# ---- who may -------------------------------------------------------------------------------------------------------


def test_private_repository_errors_name_the_fix(hub: Hub, model: ZePAD, tmp_path: Path) -> None:
    model.push_to_hub("acme/secret", token=OWNER, private=True)
    assert hub.repos["acme/secret"].private
    for name in ("acme/secret", "acme/does-not-exist"):  # the Hub does not tell the two apart
        with pytest.raises(PermissionError, match=rf"{name} is private or does not exist.*give token="):
            ZePAD.from_pretrained(name)
    with pytest.raises(PermissionError, match="the token is not accepted"):
        ZePAD.from_pretrained("acme/secret", token="hf_mistyped")
    with pytest.raises(FileNotFoundError, match="does not exist, or is private and not open to the account"):
        ZePAD.from_pretrained("acme/secret", token=GUEST)
    assert same(ZePAD.from_pretrained("acme/secret", token=OWNER), model)
    hub.repos["acme/tiny-clip"].private = True
    with pytest.raises(PermissionError, match="acme/tiny-clip"):
        make_zepad(BASE).push_to_hub("acme/tiny-clip", token="hf_mistyped")
    assert same(ZePAD.from_pretrained("acme/secret", token=OWNER, cache_dir=tmp_path / "elsewhere"), model)


def test_push_errors_name_the_fix(hub: Hub, model: ZePAD, clip_source: str, tmp_path: Path) -> None:
    hub.put("acme/taken", {"README.md": b"hello"})
    for name, token, message in (
        ("acme/new", None, "acme/new is not open: a token is needed"),
        ("acme/new", "hf_mistyped", "acme/new is not open: the token is not accepted"),
        ("acme/new", GUEST, "acme/new may not be written to with this token"),
        ("acme/taken", GUEST, "acme/taken may not be written to with this token"),
    ):
        with pytest.raises(PermissionError, match=message):
            model.push_to_hub(name, token=token)
    with pytest.raises(ValueError, match=r"a/b/c is no name on the Hub.*owner/name"):
        model.push_to_hub("a/b/c", token=OWNER)
    with pytest.raises(
        ValueError, match=r"this base encoder is on this machine alone; push it first.*hf-hub:owner/name"
    ):
        make_zepad(clip_source).push_to_hub("acme/new", token=OWNER)
    with pytest.raises(ValueError, match="Invalid metadata"):
        model.push_to_hub("acme/new", token=OWNER, card="---\nbase_model: no name of a model\n---\n")
    with pytest.raises(FileNotFoundError, match="needs a card"):
        push_folder(tmp_path, "acme/new", token=OWNER)
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights\.pt: publish safetensors"):
        push_folder(tmp_path, "acme/new", token=OWNER)


def test_push_skips_unfinished_files(hub: Hub, tmp_path: Path) -> None:
    hidden = (".half-written", ".env", "figures/.half-written", ".eval_results/.half-written", ".git[1]/config")
    kept = {"README.md", "figures/a.png", ".eval_results/a.yaml"}
    for name in (*kept, *hidden, "cache/stage.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("something")
    address = push_folder(tmp_path, "acme/folder", token=OWNER)
    assert set(hub.files("acme/folder")) == {".gitattributes", *kept}
    assert address == f"{hub.url}/acme/folder/commit/{hub.repos['acme/folder'].find('main')}"


def test_token_never_appears_in_output(
    hub: Hub,
    model: ZePAD,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(constants, "HF_DEBUG", True)  # the client then logs whole requests
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="huggingface_hub")
    wrong = "hf_WrongSecretWrongSecret"
    texts = []
    model.push_to_hub("acme/secret", token=OWNER, private=True)
    loaded = ZePAD.from_pretrained("acme/secret", token=OWNER, cache_dir=tmp_path / "elsewhere")
    for action in (
        lambda: ZePAD.from_pretrained("acme/secret", token=wrong, cache_dir=tmp_path / "empty"),
        lambda: model.push_to_hub("acme/secret", token=wrong),
        lambda: model.push_to_hub("acme/secret", token=GUEST),
        lambda: ZePAD.from_pretrained("acme/secret", token=GUEST, revision="v9"),
    ):
        with pytest.raises((OSError, ValueError)) as raised:
            action()
        texts += ["".join(traceback.format_exception(raised.value)), repr(raised.value)]
    captured = capfd.readouterr()
    # the transport's trace of what a server answered is the server's business; what was sent is ours
    logged = [text for text in map(logging.LogRecord.getMessage, caplog.records) if "receive_response" not in text]
    texts += [*logged, captured.out, captured.err]
    texts.append(repr(vars(loaded)["_access"]))
    everything = "\n".join(texts).encode() + pickle.dumps(loaded.config) + pickle.dumps(loaded._access)
    everything += b"".join(data for repo in hub.repos.values() for data in repo.commits[repo.refs["main"]].values())
    assert len(logged) > 20
    for secret in (OWNER, GUEST, wrong):
        assert secret.encode() not in everything


# ---- perturbations and records -------------------------------------------------------------------------------------


def test_perturbations_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    delta = torch.empty(3, 8, 8).uniform_(-4 / 255, 4 / 255, generator=torch.Generator().manual_seed(0))
    made = Perturbation(delta, 4 / 255, provenance={"attack": "feature_uap", "seed": 3})
    made.push_to_hub("acme/uap", token=OWNER)
    loaded = Perturbation.from_hub("acme/uap", epsilon=4 / 255, cache_dir=tmp_path / "elsewhere")
    assert torch.equal(loaded.delta, made.delta)
    assert (loaded.epsilon, loaded.norm, loaded.provenance) == (made.epsilon, made.norm, made.provenance)
    card = hub.files("acme/uap")["README.md"].decode()
    assert ModelCard(card).data.library_name == "zepad-mm"
    assert "linf, budget\n4/255" in card
    assert "| attack | `feature_uap` |" in card
    with pytest.raises(ValueError, match="was made for epsilon 4/255, expected 8/255"):
        Perturbation.from_hub("acme/uap", epsilon=8 / 255)
    with pytest.raises(FileNotFoundError, match=r"acme/tiny-clip has no perturbation\.safetensors"):
        Perturbation.from_hub("acme/tiny-clip")
    with pytest.raises(PermissionError, match="token"):
        made.push_to_hub("acme/other")


def test_evaluation_records_on_the_hub(hub: Hub, images: torch.Tensor, tmp_path: Path) -> None:
    from zepad_mm.data import LabelledImages

    model = headed(BASE).set_undefended(headed(BASE).branch("one"))
    part = LabelledImages(images, torch.tensor([0, 1, 2, 0]), CLASSES, "noise")
    settings = EvalSettings(threats=("clean", "T2"), steps=1, restarts=1, diagnostics_n=0)
    report = evaluate(model, data=EvalData(part, part, part), settings=settings, out=tmp_path / "out")
    push_report(tmp_path / "out", "acme/report", token=OWNER)
    files = hub.files("datasets/acme/report")
    assert set(files) - {".gitattributes"} == {"README.md", "report.json", "report.md", "records.parquet"}
    folder = fetch_report("acme/report", cache_dir=tmp_path / "elsewhere")
    assert Report.load(folder).rows == report.rows
    assert Records.load(folder).rows() == report.rows
    assert (folder / "records.parquet").read_bytes() == (tmp_path / "out" / "records.parquet").read_bytes()
    assert b"data_files: records.parquet" in files["README.md"]
    report.rows[0]["accuracy"] = 1.0
    report.save(tmp_path / "out")
    with pytest.raises(ValueError, match="of different evaluations"):
        push_report(tmp_path / "out", "acme/report", token=OWNER)
    with pytest.raises(FileNotFoundError, match="expected the report of an evaluation"):
        push_report(tmp_path, "acme/report", token=OWNER)


def test_eval_results_are_pushed_with_their_model(hub: Hub, model: ZePAD, tmp_path: Path) -> None:
    """A report on a data set of the Hub, as the Hub's own parser reads it; gone when other weights are pushed."""
    hub.put("datasets/acme/wds_pets", webdataset(CLASSES, images=9))
    settings = EvalSettings(
        threats=("clean", "T2"), steps=1, restarts=1, diagnostics_n=0, n=4, n_validation=2, n_surrogate=2,
        test_split="test", validation_split="test", surrogate_split="test",
    )  # fmt: skip
    report = evaluate(model, data="wds:acme/wds_pets", settings=settings)
    files = eval_result_files(model.config, report)
    model.push_to_hub("acme/defended", token=OWNER, card=model_card(model.config, report), eval_results=files)
    pushed = hub.files("acme/defended")
    entries = parse_eval_result_entries(yaml.safe_load(pushed[".eval_results/zepad-mm.yaml"]))
    assert [(entry.dataset_id, entry.task_id) for entry in entries] == [
        ("acme/wds_pets", "clean"),
        ("acme/wds_pets", "T2"),
    ]
    legacy = ModelCard(pushed["README.md"].decode()).data
    assert [result.metric_value for result in legacy.eval_results] == [entry.value for entry in entries]
    assert {result.dataset_type for result in legacy.eval_results} == {"acme/wds_pets"}
    assert legacy.library_name == "zepad-mm"
    assert ZePAD.from_pretrained("acme/defended", cache_dir=tmp_path / "elsewhere").config.fusion == model.config.fusion
    model.push_to_hub("acme/defended", token=OWNER)
    assert ".eval_results/zepad-mm.yaml" not in hub.files("acme/defended")


# ---- as a user does it ---------------------------------------------------------------------------------------------

# what the documents show: an encoder's source, in Python, the repository below it, and its file on this disk
EXAMPLES: dict[str, tuple[str, str, Callable[[Path, int], None]]] = {
    '"open_clip:hf-hub:acme/clip"': ("acme/clip", "open_clip:local-dir:{}", write_clip_repository),
    '"timm:hf-hub:acme/vit"': ("acme/vit", "timm:local-dir:{}", write_timm_repository),
    '"hf:acme/hf-clip"': ("acme/hf-clip", "hf:local-dir:{}", write_hf_clip_repository),
    '"hf:acme/dinov2"': ("acme/dinov2", "hf:local-dir:{}", write_dinov2_repository),
    "f\"ssl:{fetch('acme/ssl', ['moco.pth'])}/moco.pth\"": ("acme/ssl", "ssl:{}/moco.pth", write_ssl_repository),
}


# the repositories that the documents' block of Python names, as small ones
DOCUMENTED: dict[str, Callable[[Path, int], None]] = {
    "timm/vit_large_patch14_clip_224.openai": write_clip_repository,
    "chs20/fare4-clip": write_clip_repository,
    "openai/clip-vit-base-patch32": write_hf_clip_repository,
    "facebook/dinov2-small": write_dinov2_repository,
    "owner/ssl": partial(write_ssl_repository, name="byol.pth"),
}


def test_documented_examples_run(hub: Hub, tmp_path: Path) -> None:
    """All of them in one process of its own, as a user would run them."""
    images = torch.ones(1, 3, 40, 40) / 3
    lines, expected = ["import torch", "from zepad_mm import load_encoder", "from zepad_mm.utils.hub import fetch"], []
    for source, (name, local, write) in EXAMPLES.items():
        folder = tmp_path / name.partition("/")[2]
        write(folder, 0)
        hub.put(name, folder)
        with torch.no_grad():
            expected.append(load_encoder(local.format(folder))(images).double().sum().item())
        lines += [f"encoder = load_encoder({source})", "features = encoder(torch.ones(1, 3, 40, 40) / 3)"]
        lines += ["print(features.double().sum().item())"]
    assert len(expected) >= 2
    for name, write in DOCUMENTED.items():
        write(tmp_path / name.replace("/", "-"), 0)
        hub.put(name, tmp_path / name.replace("/", "-"))
    hub.tokens["hf_ReaderSecretReaderSecret"] = "owner"
    logged_in = {"HF_TOKEN": "hf_ReaderSecretReaderSecret", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"}
    (block,) = (block for document in DOCUMENTS for block in blocks(document, "py"))
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*lines, block])],
        env={**os.environ, **environment(hub, tmp_path / "own-cache"), **logged_in},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    *sums, answers = done.stdout.splitlines()
    assert [float(line) for line in sums] == pytest.approx(expected, rel=1e-5)
    assert [{entry["label"] for entry in one} for one in ast.literal_eval(answers)] == [{"a cat", "a dog"}] * 2
    assert "config.json" in hub.files("owner/name")
