"""CLIP's byte pair encoding reduced to the words that the CLIP reads, as a tokenizer.json that open_clip loads.

A full vocabulary of 49,408 tokens would take more room than all the rest of the text tower. Merges are dropped, never
changed: a word keeps CLIP's tokens where they are left, and falls into more and smaller pieces where they are not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regex
from open_clip.tokenizer import SimpleTokenizer

from zepad_mm.utils.io import write_json

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"  # padded with token 0, as open_clip's own tokenizer does
PATTERN = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def choose_merges(weights: Mapping[str, float], size: int) -> list[tuple[str, str]]:
    """The merges that serve most of the weighted words, in CLIP's order, closed under what they are made of.

    Args:
        weights: how much each word counts. size: of the vocabulary, with 512 bytes and two special tokens.
    """
    bpe = SimpleTokenizer()
    merges = list(bpe.bpe_ranks)
    made_of = {"".join(merge): merge for merge in merges}
    value: defaultdict[str, float] = defaultdict(float)
    for word, weight in weights.items():
        encoded = "".join(bpe.byte_encoder[byte] for byte in word.encode())
        for token in bpe.bpe(encoded).split(" "):
            value[token] += weight
    kept: set[str] = set()
    room = size - 512 - 2
    for token, _ in sorted(value.items(), key=lambda item: (-item[1], item[0])):
        needed = _parts(token, made_of) - kept
        if len(kept) + len(needed) <= room:
            kept |= needed
    return [merge for merge in merges if "".join(merge) in kept]


def _parts(token: str, made_of: dict[str, tuple[str, str]]) -> set[str]:
    if token not in made_of:
        return set()
    return {token}.union(*(_parts(part, made_of) for part in made_of[token]))


def build_tokenizer(merges: list[tuple[str, str]], context_length: int) -> Any:
    """A ``tokenizers.Tokenizer`` that lower-cases, splits and merges like CLIP's."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    bytes_ = list(SimpleTokenizer().byte_encoder.values())
    tokens = [*bytes_, *(byte + "</w>" for byte in bytes_), *("".join(merge) for merge in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", continuing_subword_prefix="")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([START, END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, vocabulary[START]), (END, vocabulary[END])]
    )
    tokenizer.enable_truncation(context_length)
    tokenizer.enable_padding(length=context_length, pad_id=0, pad_token=PAD)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path, context_length: int) -> None:
    """Writes what ``AutoTokenizer.from_pretrained`` and so ``open_clip.get_tokenizer("local-dir:...")`` read."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": START,
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": END,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", config)


def words_of(text: str) -> list[str]:
    """The words of a text as the byte pair encoding sees them."""
    found: list[str] = regex.findall(PATTERN, text.lower())
    return found
