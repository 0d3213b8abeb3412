"""Cuts of a text whose pieces have, one after the other, the tokens of the complete text.

With T(text) the tokens without special tokens, a place is an exact cut of a tokenizer if T(left + right) = T(left) +
T(right) whatever else is in the text. Which places are exact follows from the parts of the tokenizer:

- Pre-tokenizers that split at white space (byte-level BPE, WordPiece, Unigram with Metaspace): a pre-token never has a
  character before a space in it, and what a regular expression without lookbehind matches from a place on depends on
  the text from there. So the place before a single space between two visible characters is exact; the space belongs to
  the right piece, as in the pre-tokens ` word` and `▁word`.
- BPE without a pre-tokenizer (Llama 2, Gemma): merges only make tokens of the vocabulary. Where none has `▁` after a
  character, no merge ever crosses the place between the two.
- Byte-level BPE and WordPiece also split between a letter and punctuation.

Normalizers and added tokens must not reach across: those listed here change or match characters on one side only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?"
_REST = r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN_PATTERNS = frozenset(
    {
        GPT2_PATTERN,
        # Llama 3 (GPT-4), Qwen 2 and 3, and Qwen 3.5.
        rf"{_WORDS}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+{_REST}",
        rf"{_WORDS}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+{_REST}",
        rf"{_WORDS}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+{_REST}",
    }
)
"""Regular expressions of pre-tokenizers that never match a visible character and a space after it, nor a letter and
punctuation other than an apostrophe after it, and do not look back."""

# Letters that Unicode joins with a space after them to one grapheme (GCB=Prepend), which Precompiled maps as one.
_JOINING = "\u0d4e\U000111c2\U000111c3\U0001193f\U00011941\U00011a3a\U00011a84-\U00011a89\U00011d46\U00011f02"
_AFTER_VISIBLE = rf"(?<=[\w!-~])(?<![{_JOINING}])"
SPACE_CUT = rf"{_AFTER_VISIBLE}(?= [\w!-~])"
DROPPED_SPACE_CUT = rf"{_AFTER_VISIBLE} (?=[\w!-~])"
# Not the apostrophe: `'s` may be one pre-token with the letters before it.
_PUNCTUATION = '!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~'

_LOCAL_NORMALIZERS = frozenset(
    {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Precompiled", "Nmt"}
)
_MARK = "\u2581"


def find_cut_pattern(backend: Tokenizer) -> re.Pattern[str] | None:
    """The exact cuts of a tokenizer: `text[: match.start()]` and `text[match.end() :]` are the two pieces.

    Returns:
        None if no place is known to be exact.
    """
    spec = json.loads(backend.to_str())
    normalizers = list(_flatten(spec["normalizer"], "normalizers"))
    splitters = list(_flatten(spec["pre_tokenizer"], "pretokenizers"))
    added = [token["content"] for token in spec["added_tokens"]]
    if spec["model"].get("dropout") or any(token["rstrip"] for token in spec["added_tokens"]):
        return None
    if any(content == " " or (" " in content and content.strip(" ")) for content in added):
        return None
    if not all(map(_is_local, normalizers)):
        return None
    strips = any(part["type"] == "Strip" for part in normalizers)
    if strips and any(token["normalized"] for token in spec["added_tokens"]):
        # Found in the stripped text: the space before one is a token of its own, unless a piece begins with it.
        return None
    if any(part["type"] == "Prepend" for part in normalizers):
        before_mark = None if splitters or strips else _find_before_mark(spec)
        if before_mark is None:
            return None
        # Every piece gets the mark in front, in place of the space that the cut drops. So does what is between added
        # tokens, but there the space is kept too.
        after = "".join(content[0] for content in added)
        before = before_mark + "".join(content[-1] for content in added)
        return re.compile(rf"{_not_one_of(before, '<!')}{DROPPED_SPACE_CUT}{_not_one_of(after, '!')}")
    if not _splits_at_spaces(normalizers, splitters):
        before_mark = None if strips else _find_before_mark(spec)
        return None if before_mark is None else re.compile(rf"{_not_one_of(before_mark, '<!')}{SPACE_CUT}")
    punctuation = _cut_punctuation(spec, normalizers, splitters)
    if not punctuation:
        return re.compile(SPACE_CUT)
    return re.compile(rf"{SPACE_CUT}|(?<=[A-Za-z])(?=[{re.escape(punctuation)}])")


def _flatten(part: dict[str, Any] | None, key: str) -> Iterator[dict[str, Any]]:
    """A component of a tokenizer, or those of a sequence of them."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for member in part[key]:
            yield from _flatten(member, key)
    else:
        yield part


def _is_local(normalizer: dict[str, Any]) -> bool:
    """Whether a normalizer treats both sides of a single space between visible characters by themselves."""
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"]
        text = pattern.get("String")
        return pattern.get("Regex") == " {2,}" if text is None else text == " " or " " not in text
    if normalizer["type"] == "Prepend":
        return bool(normalizer["prepend"] == _MARK)
    return normalizer["type"] in _LOCAL_NORMALIZERS or normalizer["type"] == "Strip"


def _splits_at_spaces(normalizers: list[dict[str, Any]], splitters: list[dict[str, Any]]) -> bool:
    """Whether pre-tokens end before every single space, and those after it do not depend on what is before it."""
    if any(_replaces_spaces(part) for part in normalizers):
        return False
    strips = any(part["type"] == "Strip" for part in normalizers)
    kinds = [part["type"] for part in splitters]
    if kinds in (["BertPreTokenizer"], ["WhitespaceSplit"], ["Whitespace"]):
        return True
    if kinds in (["Metaspace"], ["WhitespaceSplit", "Metaspace"]):
        metaspace = splitters[-1]
        # With `first`, a word without the space before it is known by its place in the text.
        scheme = metaspace["prepend_scheme"]
        is_known = scheme == "always" or (scheme == "never" and len(kinds) == 1 and not strips)
        return bool(metaspace["split"] and metaspace["replacement"] == _MARK and is_known)
    if strips or not kinds or kinds[-1] != "ByteLevel":
        return False
    *before, byte_level = splitters
    if any(part["type"] not in ("Digits", "Punctuation", "Split") for part in before):
        return False
    patterns = [part for part in before if part["type"] == "Split"]
    if not all(part["pattern"].get("Regex") in KNOWN_PATTERNS and _is_isolated(part) for part in patterns):
        return False
    # A prefix space is only added to a piece that has none, but to every split of an earlier pre-tokenizer.
    return bool(byte_level["use_regex"] or patterns) and not (before and byte_level["add_prefix_space"])


def _replaces_spaces(normalizer: dict[str, Any]) -> bool:
    return normalizer["type"] == "Replace" and normalizer["pattern"].get("String") == " "


def _is_isolated(split: dict[str, Any]) -> bool:
    return split["behavior"] == "Isolated" and not split["invert"]


def _find_before_mark(spec: dict[str, Any]) -> str | None:
    """Characters that some token of a BPE has before `▁`, if its text has `▁` for spaces and is not split at them.

    A pre-tokenizer that splits at spaces finds none after the normalizer; Metaspace may replace them as well.

    Returns:
        None for other tokenizers.
    """
    model = spec["model"]
    if model["type"] != "BPE" or _MARK not in model["vocab"]:
        return None
    normalizers = list(_flatten(spec["normalizer"], "normalizers"))
    replaces = any(_replaces_spaces(part) and part["content"] == _MARK for part in normalizers)
    # Others could make such a character from another one.
    if not all(part["type"] == "Prepend" or _replaces_spaces(part) for part in normalizers):
        return None
    match list(_flatten(spec["pre_tokenizer"], "pretokenizers")):
        case []:
            is_marked = replaces
        case [{"type": "Split", "pattern": {"String": " "}}]:
            is_marked = replaces
        case [{"type": "Metaspace", "replacement": replacement}]:
            is_marked = replacement == _MARK
        case _:
            is_marked = False
    if not is_marked:
        return None
    crosses = re.compile(rf"([^{_MARK}]){_MARK}")
    return "".join({char for token in model["vocab"] for char in crosses.findall(token)})


def _not_one_of(characters: str, look: str) -> str:
    """A regular expression that looks behind or ahead and refuses these characters."""
    return rf"(?{look}[{re.escape(''.join(sorted(set(characters))))}])" if characters else ""


def _cut_punctuation(spec: dict[str, Any], normalizers: list[dict[str, Any]], splitters: list[dict[str, Any]]) -> str:
    """ASCII punctuation before which a text may be cut, after an ASCII letter."""
    kinds = [part["type"] for part in splitters]
    is_byte_level = kinds[-1:] == ["ByteLevel"] and not splitters[-1]["add_prefix_space"]
    if not (is_byte_level or kinds == ["BertPreTokenizer"]):
        return ""
    if any(part["type"] not in ("NFC", "BertNormalizer", "Lowercase") for part in normalizers):
        return ""
    added = spec["added_tokens"]
    completes_words = [token["content"] for token in added if token["single_word"]]
    # Such a token is found in a piece that begins with it, but not after a letter.
    if any(not content[0].isalnum() for content in completes_words):
        return ""
    # An added token is one token wherever it stands: cuts must not be within one.
    kept = set().union(*(token["content"][1:] for token in added))
    # It counts as a part of a word.
    kept |= {"_"} if completes_words else set()
    return "".join(char for char in _PUNCTUATION if char not in kept)
