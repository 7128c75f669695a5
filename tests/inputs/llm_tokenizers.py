"""Small tokenizers of the kinds that LLMs have, trained on a few texts, and the items that tests render with them."""

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from simgr_jax.semantic_ids.codes import SemanticIds

CORPUS = [
    "A customer bought, oldest first:\nRed running shoes for men\nBlue wool hat, 2 pieces\n",
    "The customer bought: a garden hose; then a hose reel; then 12 red roses.\n\n",
    "Organic shampoo (500 ml) for dry hair - with aloe vera. Größe: 38\n",
] * 5
TITLES = ["Red running shoes", "Blue hat", "", "Organic shampoo (500 ml) for dry hair", "12 roses", "Größe 38"]
IDS = SemanticIds(np.random.default_rng(0).integers(0, 4, (len(TITLES), 3)).astype(np.int32), (4, 4, 4))
# What cl100k and its descendants split a text into, shortened.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def gpt2():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}, ""


def prefix_space():
    """GPT-2's, but the first word has a space before it as others have."""
    tokenizer, *others = gpt2()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer, *others


def qwen():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    return tokenizer, {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}, ""


def llama2():
    """The whole text gets a space before it. Newlines are bytes, and not part of words."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return tokenizer, {"special_tokens": ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]}, "<s>"


def llama2_legacy():
    """Each text between added tokens gets a space before it."""
    _, options, bos = llama2()
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer, options, bos


FAMILIES = (gpt2, qwen, llama2, llama2_legacy)


def train(family):
    tokenizer, options, bos = family()
    splits = tokenizer.pre_tokenizer
    tokenizer.pre_tokenizer = (
        splits or pre_tokenizers.Metaspace()
    )  # SentencePiece learns from words, but does not split texts.
    lines = CORPUS if family in (gpt2, prefix_space, qwen) else [line for text in CORPUS for line in text.splitlines()]
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=450, show_progress=False, **options))
    if splits is None:
        tokenizer.pre_tokenizer = None
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    special = {"bos_token": bos or None, "unk_token": tokenizer.model.unk_token}
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    whole.add_tokens([AddedToken(token, normalized=False) for token in IDS.token_strings()])
    return whole
