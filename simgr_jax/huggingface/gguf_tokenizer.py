"""The tokenizer that a GGUF file describes, for the `tokenizers` library.

A file has the vocabulary and says what kind of tokenizer it is for; how a text is split before merging it has only as a
name. Which name means what: `llama-vocab.cpp` in llama.cpp, and the tokenizer.json of the models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from simgr_jax.errors import UserError, first_line
from simgr_jax.huggingface.gguf_file import GgufFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPACE = "▁"  # SentencePiece's.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
# Each digit by itself, then as GPT-2.
_DIGITS_AND_GPT2 = (r"\p{N}", *_GPT2)
_LLAMA3 = (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",)
_QWEN2 = (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_REST_WITH_SLASH}",
)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_REST_WITH_SLASH}",
)
# By the name in `tokenizer.ggml.pre`: the expressions whose matches are split off, one after the other.
_SPLITS = {
    "gpt-2": _GPT2,
    "smollm": _DIGITS_AND_GPT2,
    "refact": _DIGITS_AND_GPT2,  # Granite 3.
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "lfm2": _LLAMA3,
    "smaug-bpe": _LLAMA3,  # SmolLM3.
    "dbrx": _LLAMA3,  # Phi-4, OLMo 2 and 3.
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "gpt-4o": _GPT4O,  # Phi-4-mini.
    "tekken": _TEKKEN,  # Mistral Nemo and Ministral.
}
# A word that is in the vocabulary is its token, whatever its merges are. Unless the file says otherwise, a text begins
# with BOS.
_WHOLE_WORDS_AND_BOS = {"llama-bpe", "llama3", "llama-v3", "lfm2", "tekken"}


def build(file: GgufFile) -> PreTrainedTokenizerFast:
    """
    Raises:
      UserError: the file has no tokenizer, or one of an unknown kind.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        vocabulary = _Vocabulary(file)
        tokenizer = _byte_level(vocabulary) if vocabulary.kind == "gpt2" else _sentencepiece(vocabulary)
        _add_tokens(tokenizer, vocabulary)
        special = vocabulary.special_tokens()
        tokenizer.post_processor = _around_text(vocabulary, special)
    except UserError:
        raise
    # The tokenizers library raises plain Exceptions; the rest is what lists of other lengths or types lead to.
    except Exception as error:
        raise UserError(
            f"{file.path}: its tokenizer can't be read ({first_line(error)[:150]}); copy or download the file again"
        ) from error
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=file.metadata.get("tokenizer.chat_template"), **special
    )


class _Vocabulary:
    """The metadata that begin with "tokenizer.ggml.".

    Attributes:
      kind: "gpt2" (BPE on bytes) or "llama" (SentencePiece).
      split: the name of the rule by which a text is split.
      tokens: without those that the converter invented for the table's last rows.
      types: of the tokens.
    """

    def __init__(self, file: GgufFile):
        """
        Raises:
          UserError: the kind or the split is unknown, or there are no tokens.
        """
        self.file, self._metadata = file, file.metadata
        self.kind, self.split = self.get("model"), self.get("pre", "")
        if self.kind not in ("gpt2", "llama"):
            raise self._unknown("model", self.kind, ("gpt2", "llama"))
        if self.kind == "gpt2" and self.split not in _SPLITS:
            raise self._unknown("pre", self.split, tuple(_SPLITS))
        tokens = self.get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise UserError(f"{file.path}:tokenizer.ggml.tokens: is no list of tokens; use a file with a tokenizer")
        types = self.get("token_type", [TokenType.NORMAL] * len(tokens))
        count = len(tokens)
        while count and types[count - 1] == TokenType.UNUSED and tokens[count - 1] == f"[PAD{count - 1}]":
            count -= 1
        self.tokens, self.types = tokens[:count], types[:count]

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def special_tokens(self) -> dict[str, str]:
        """BOS, EOS, padding and unknown token, as Transformers calls them."""
        defaults = {"bos": 1, "eos": 2, "unknown": 0} if self.kind == "llama" else {}
        names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        ids = {name: self.get(f"{key}_token_id", defaults.get(key)) for key, name in names.items()}
        return {name: self.tokens[number] for name, number in ids.items() if number is not None}

    def _unknown(self, key: str, found: Any, known: tuple[str, ...]) -> UserError:
        return UserError(
            f"{self.file.path}:tokenizer.ggml.{key}: {found!r} is not supported; use a model with one of "
            f"{', '.join(known)}, or a Hugging Face folder of this one"
        )


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    merges = [tuple(merge.split(" ")) for merge in vocabulary.get("merges")]
    tokenizer = Tokenizer(BPE(ids, merges, ignore_merges=vocabulary.split in _WHOLE_WORDS_AND_BOS))
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in _SPLITS[vocabulary.split]]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    """SentencePiece's BPE, which merges the neighbors whose whole has the highest score."""
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    unknown = vocabulary.special_tokens()["unk_token"]
    has_bytes = TokenType.BYTE in vocabulary.types
    tokenizer = Tokenizer(BPE(ids, _merges(vocabulary, ids), unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes))
    space_first = vocabulary.get("add_space_prefix", True)
    prefix = [normalizers.Prepend(_SPACE)] if space_first else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if space_first else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(vocabulary: _Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs that make a token, the token with the highest score first."""
    left, right, scores = [], [], []
    for token, kind, score in zip(vocabulary.tokens, vocabulary.types, vocabulary.get("scores"), strict=False):
        for cut in range(1, len(token) if kind == TokenType.NORMAL else 0):
            if (first := token[:cut]) in ids and (second := token[cut:]) in ids:
                left.append(first)
                right.append(second)
                scores.append(-score)
    order = np.lexsort(([ids[token] for token in right], [ids[token] for token in left], scores))
    return [(left[i], right[i]) for i in order]


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Tokens that are found in a text before it is split: control tokens, and others that are not special."""
    by_kind = list(zip(vocabulary.tokens, vocabulary.types, strict=True))
    control = [token for token, kind in by_kind if kind in (TokenType.CONTROL, TokenType.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    others = [token for token, kind in by_kind if kind == TokenType.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in others])


def _around_text(vocabulary: _Vocabulary, special: dict[str, str]) -> processors.TemplateProcessing:
    has_bos = vocabulary.kind == "llama" or vocabulary.split in _WHOLE_WORDS_AND_BOS
    before = [special["bos_token"]] if vocabulary.get("add_bos_token", has_bos) else []
    after = [special["eos_token"]] if vocabulary.get("add_eos_token", False) else []
    ids = [(token, vocabulary.tokens.index(token)) for token in {*before, *after}]
    return processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=ids)
