"""Titles in prompts: control tokens in them are text, for the exported tokenizer, too; and they are tokenized once."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from simgr_jax.errors import UserError
from simgr_jax.huggingface.llm_tokenizer import load_tokenizer, save_tokenizer
from simgr_jax.inputs import item_texts
from simgr_jax.inputs.control_tokens import ControlTokens
from tests.inputs.llm_tokenizers import FAMILIES, IDS, TITLES, gpt2, train

STRINGS = IDS.token_strings()
CONTROL = ("<|im_end|>", "<think>", "[INST]", *STRINGS)


def read(tokenizer, titles, item="\n{title} {codes}", prefix="<|im_end|>", max_title_tokens=100, cache_dir=None):
    options = {"prefix": prefix, "item": item, "max_title_tokens": max_title_tokens}
    return item_texts.read(tokenizer, STRINGS, titles, cache_dir, **options)


@pytest.fixture(scope="module", params=FAMILIES, ids=[family.__name__ for family in FAMILIES])
def tokenizers(request, tmp_path_factory):
    """A tokenizer with control tokens, marked as special or not, and the one that is read of its export."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = train(request.param)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|im_end|>", normalized=False)]})
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("[INST]", normalized=False)])
    save_tokenizer(tokenizer, folder)
    return tokenizer, load_tokenizer(folder)


def tokens_of(made, number, tokenizer):
    """The tokens that a model reads of a prompt that begins with this item, up to its codes."""
    codes, inputs = tokenizer.convert_tokens_to_ids(STRINGS), [*made.start, *made.inside[number][made.merged :]]
    return [codes[one] if one < len(STRINGS) else int(one) - len(STRINGS) for one in inputs]


def assert_read_as_text(tokenizers, titles, item="\n{title} {codes}"):
    """The tokens in training are those of the exported tokenizer, and none of them is a control token; returns the
    texts."""
    tokenizer, exported = tokenizers
    made, prefix = read(tokenizer, titles, item), "<|im_end|>"
    control = set(tokenizer.convert_tokens_to_ids(CONTROL))
    for number, (title, text) in enumerate(zip(titles, made.texts, strict=True)):
        tokens = tokens_of(made, number, tokenizer)
        assert [*tokens, exported.convert_tokens_to_ids("<b_1>")] == exported(f"{prefix}{text}<b_1>").input_ids
        assert control.isdisjoint(tokens[tokens.index(exported.convert_tokens_to_ids(prefix)) + 1 :])
        # Nothing but blanks is added.
        assert text.replace(" ", "") == item.format(title=title, codes="").replace(" ", "")
    return made.texts


SPELLED = {
    "Red <|im_end|> hat": "Red < |im_end|> hat",
    "<|im_end|><|im_end|><think>12": "< |im_end|>< |im_end|>< think>12",
    "<a_0><b_3>Größe": "< a_0>< b_3>Größe",
    "<|im_end<|im_end|>|>[INST]": "<|im_end< |im_end|>|>[ INST]",
    "<|im_end> is none [INS T]": "<|im_end> is none [INS T]",
    "<<a_1>": "<< a_1>",
}


def test_control_tokens_in_a_title_get_a_blank(tokenizers):
    texts = assert_read_as_text(tokenizers, list(SPELLED))
    assert texts == [f"\n{title} " for title in SPELLED.values()]


PIECES = [
    "<|im_end|>",
    "<|im_end",
    "|im_end|>",
    "<think>",
    "think",
    "[INST]",
    "INST",
    "<a_1>",
    "<a_1",
    "a_1",
    "<s>",
    "s",
]
PIECES += [
    "<unk>",
    "<0x0A>",
    "<",
    ">",
    "|",
    "[",
    "]",
    " ",
    "▁",
    "\u212a",
    "＜s＞",
    "e\u0301",
    "東",
    "Red hat",
    "{",
    "}",
]


@settings(max_examples=60, deadline=None)
@given(
    titles=st.lists(st.lists(st.sampled_from(PIECES), max_size=6).map("".join).map(str.strip), min_size=1, max_size=4),
    item=st.sampled_from(
        ["\n{title} {codes}", "\n<{title}> {codes}", "\n[{title}]{title}>{codes}", "\n<|{title}|>{codes}"]
    ),
)
@example(titles=["a_1", "im_end", "think", "think>"], item="\n<{title}> {codes}")
@example(titles=["im_end"], item="\n<|{title}|>{codes}")
def test_whatever_a_title_spells_is_read_as_text(tokenizers, titles, item):
    """Also together with what stands beside it in the template."""
    titles = [" ".join(title.split()) for title in titles]
    assert_read_as_text(tokenizers, titles, item)


def test_a_control_token_is_broken_however_the_tokenizer_normalizes_it():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(show_progress=False, initial_alphabet=alphabet))
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    whole.add_tokens([AddedToken("<end>", special=True, normalized=True)])
    end = whole.convert_tokens_to_ids("<end>")
    for title, broken in (("a ＜End＞ b", "a ＜ End＞ b"), ("<END>", "< END>"), ("end", "end")):
        assert ControlTokens(whole).broken(title) == broken
        assert end not in whole(broken).input_ids


def test_a_token_that_no_blank_breaks_is_told_in_one_line():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(show_progress=False, initial_alphabet=alphabet))
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    whole.add_tokens([AddedToken("<end>", special=True, normalized=True)])
    with pytest.raises(UserError, match=r"^item text 'the <end>': the tokenizer reads a control token in it, whatever"):
        ControlTokens(whole).broken("the <end>")


def test_titles_without_control_tokens_stay_as_they_are(tokenizers):
    """Tokens for unknown characters and for single bytes are special, too, but no title spells them."""
    titles = [*TITLES[:4], "東京 <12> é [x]", "a < b > c"]
    assert read(tokenizers[0], titles).texts == [f"\n{title} " for title in titles]


def test_titles_are_tokenized_once(tmp_path, monkeypatch):
    tokenizer = train(gpt2)
    first = read(tokenizer, TITLES, prefix="", cache_dir=tmp_path)
    monkeypatch.setattr(item_texts, "encode", None)  # Whoever tokenizes fails.
    again = read(tokenizer, TITLES, prefix="", cache_dir=tmp_path)
    assert again.texts == first.texts and again.merged == first.merged
    for one, other in ((again.start, first.start), (again.inside.values, first.inside.values)):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
    np.testing.assert_array_equal(again.inside.offsets, first.inside.offsets)
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_kept_is_used_for_the_same_titles_tokenizer_and_options_only(tmp_path):
    def number_of_files(tokenizer, titles, **options):
        read(tokenizer, titles, cache_dir=tmp_path, **options)
        return len(list(tmp_path.iterdir()))

    tokenizer = train(gpt2)
    assert number_of_files(tokenizer, TITLES) == 1
    assert number_of_files(tokenizer, [*TITLES[:-1], "other"]) == 2
    assert number_of_files(tokenizer, TITLES, max_title_tokens=3) == 3
    assert number_of_files(tokenizer, TITLES, item="; {title}{codes}") == 4
    assert number_of_files(tokenizer, TITLES, prefix="x") == 5
    tokenizer.add_tokens([AddedToken("<new>", normalized=False)])
    assert number_of_files(tokenizer, TITLES) == 6
    assert number_of_files(tokenizer, TITLES) == 6


def test_a_template_without_titles_keeps_nothing(tmp_path):
    assert read(train(gpt2), None, item="; {codes}", cache_dir=tmp_path).texts == ["; "]
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_told_in_one_line(tmp_path):
    tokenizer = train(gpt2)
    read(tokenizer, TITLES, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"\.npz: is damaged .*; remove it, and it will be made again"):
        read(tokenizer, TITLES, cache_dir=tmp_path)
