import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from simgr_jax import default_config
from simgr_jax.data.dataset import EvaluationCases, Sequences
from simgr_jax.errors import UserError
from simgr_jax.inputs import control_tokens, item_texts, prompts
from simgr_jax.inputs.rank_batches import rank_batches
from simgr_jax.semantic_ids.codes import SemanticIds
from tests.inputs.llm_tokenizers import FAMILIES, IDS, TITLES, gpt2, llama2, qwen, train


@pytest.fixture(scope="module", params=FAMILIES, ids=[family.__name__ for family in FAMILIES])
def tokenizer(request):
    return train(request.param)


def make(tokenizer, item="{codes}", prefix="", titles=TITLES, max_title_tokens=32):
    return prompts.text_prompt(IDS, read(tokenizer, item, prefix, titles, max_title_tokens))


def read(tokenizer, item="{codes}", prefix="", titles=TITLES, max_title_tokens=32, cache_dir=None):
    options = {"prefix": prefix, "item": item, "max_title_tokens": max_title_tokens}
    return item_texts.read(tokenizer, IDS.token_strings(), titles, cache_dir, **options)


def read_by(prompt, items):
    """The inputs that the backbone reads for a history."""
    cases = EvaluationCases(np.zeros(1), Sequences.from_lists([items]), np.zeros(1))
    batch, _ = next(rank_batches(cases, prompt, 1, len(items), 10_000))
    return batch.inputs[0, : batch.lengths[0]]


def llm_tokens(prompt, inputs, tokenizer):
    """The inputs as tokens of the LLM's tokenizer."""
    codes = tokenizer.convert_tokens_to_ids(IDS.token_strings())
    return np.concatenate([codes, prompt.text_tokens]).astype(int)[inputs].tolist()


def codes_of(item):
    return "".join(f"<{'abc'[level]}_{code}>" for level, code in enumerate(IDS.codes[item]))


PREFIX = "A customer bought, oldest first:"
# (prefix, item template) that no family's tokenizer joins.
TEMPLATES = [
    ("", "{codes}"),
    (PREFIX, "{codes}"),
    (f"{PREFIX}\n", "{codes}"),
    (f"{PREFIX} ", "{codes}"),
    ("", " {codes}"),
    ("", "; then {codes}"),
    (PREFIX, "\n{codes}"),
    ("", "\n{title} {codes}"),
    (PREFIX, "\n{title} {codes}"),
    (PREFIX, "\n{title}:{codes}"),
    (f"{PREFIX}\n", "\n{title}:{codes}"),
    ("<a_0>", "\n{title} {{}} {codes}"),
]


@pytest.mark.parametrize(("prefix", "item"), TEMPLATES)
def test_the_model_reads_what_the_tokenizer_makes_of_the_whole_text(tokenizer, prefix, item):
    prompt = make(tokenizer, item, prefix)
    for history in ([0], [3, 1], [2, 2, 5, 4, 0], list(range(len(TITLES)))):
        text = prefix + "".join(item.format(title=TITLES[i], codes=codes_of(i)) for i in history)
        assert llm_tokens(prompt, read_by(prompt, history), tokenizer) == tokenizer(text).input_ids


TEXT = st.text(st.sampled_from("aeRrdsh :;,.\n ▁éß0<>{}"), max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    prefix=TEXT,
    before=TEXT,
    between=TEXT,
    titles=st.lists(TEXT, min_size=6, max_size=6),
    history=st.lists(st.integers(0, 5), min_size=1, max_size=4),
)
@example("000000", "", "", ["0", "", "", "", "", ""], [1])  # Only the first item's text is in the prefix.
def test_any_template_is_read_as_tokenized_or_refused(tokenizer, prefix, before, between, titles, history):
    brace = lambda text: text.replace("{", "{{").replace("}", "}}")  # noqa: E731
    try:
        prompt = make(tokenizer, f"{brace(before)}{{title}}{brace(between)}{{codes}}", prefix, titles)
    except UserError as error:
        assert str(error).startswith("config.prompt.item: the tokenizer joins")
        return
    text = "".join(before + " ".join(titles[i].split()) + between + codes_of(i) for i in history)
    assert llm_tokens(prompt, read_by(prompt, history), tokenizer) == tokenizer(prefix + text).input_ids


def test_a_beginning_that_is_tokenized_with_the_title_is_refused():
    """The space at the prefix's end becomes part of the title's first token, but not after a code."""
    with pytest.raises(UserError, match=r"^config\.prompt\.item: the tokenizer joins the beginning of ."):
        make(train(gpt2), "{title} {codes}", "bought: ")


def test_inputs_that_the_prefix_and_the_items_share_are_in_the_prefix():
    """This tokenizer has a token ":\\n", so the first item has no "\\n" of its own."""
    prompt = make(train(qwen), "\n{title} {codes}", PREFIX)
    assert prompt.merged == 1
    assert make(train(gpt2), "\n{title} {codes}", PREFIX).merged == 0


def test_the_state_is_read_at_the_last_code(tokenizer):
    prompt = make(tokenizer, "\n{title} {codes}")
    for item, piece in enumerate(prompt.pieces):
        np.testing.assert_array_equal(piece[-3:], IDS.tokens[item])


def test_a_tokenizers_own_beginning_is_kept():
    assert make(train(gpt2)).prefix.tolist() == []
    llama = train(llama2)
    prompt = make(llama)
    assert llm_tokens(prompt, prompt.prefix, llama) == [llama.bos_token_id]
    assert prompt.text_tokens.tolist() == [llama.bos_token_id]


def test_titles_are_cut_to_a_number_of_tokens():
    tokenizer = train(gpt2)
    cut = make(tokenizer, "\n{title}{codes}", max_title_tokens=3)
    tokens = tokenizer(TITLES[3], add_special_tokens=False).input_ids
    assert len(tokens) > 4
    assert llm_tokens(cut, cut.pieces[3][1:-3], tokenizer) == tokens[:3]
    whole = make(tokenizer, "\n{title}{codes}", max_title_tokens=len(tokens))
    assert llm_tokens(whole, whole.pieces[3][1:-3], tokenizer) == tokens


def test_bare_codes_are_the_same_with_a_tokenizer_or_without():
    with_tokenizer, without = make(train(gpt2)), prompts.token_prompt(IDS.tokens)
    assert read_by(with_tokenizer, [2, 0, 5]).tolist() == read_by(without, [2, 0, 5]).tolist()
    assert read_by(without, [2, 0, 5]).tolist() == IDS.tokens[[2, 0, 5]].reshape(-1).tolist()
    assert not len(with_tokenizer.text_tokens)


def test_only_text_that_occurs_is_numbered(tokenizer):
    prompt = make(tokenizer, "\n{title} {codes}", PREFIX)
    inputs = np.concatenate([prompt.prefix, prompt.pieces.values])
    assert sorted(set(inputs.tolist()) - set(range(IDS.vocab_size))) == list(
        range(IDS.vocab_size, IDS.vocab_size + len(prompt.text_tokens))
    )


def test_items_are_read_as_their_index():
    assert read_by(prompts.item_prompt(6), [2, 0, 5]).tolist() == [2, 0, 5]


def test_a_catalog_of_several_chunks_is_read_in_order(monkeypatch):
    tokenizer = train(gpt2)
    at_once = make(tokenizer, "\n{title} {codes}", PREFIX, max_title_tokens=3)
    for module in (control_tokens, item_texts):
        monkeypatch.setattr(module, "CHUNK", 2)
    in_chunks = make(tokenizer, "\n{title} {codes}", PREFIX, max_title_tokens=3)
    np.testing.assert_array_equal(at_once.pieces.values, in_chunks.pieces.values)
    np.testing.assert_array_equal(at_once.pieces.offsets, in_chunks.pieces.offsets)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("{title}", "'{title}' has to end with {codes}"),
        ("{codes}\n", "has to end with {codes} and have it once"),
        ("{codes}, {codes}", "have it once"),
        ("", "'' has to end with {codes}"),
        ("{brand} {codes}", "the placeholder {brand} is unknown; use {title} and {codes}"),
        ("{} {codes}", "the placeholder {} is unknown"),
        ("{title!r:>9} {codes}", "the placeholder {title!r:>9} is unknown"),
        ("{title.x} {codes}", "the placeholder {title.x} is unknown"),
        ("a } b {codes}", "is not a template (Single '}' encountered in format string); write {{ and }}"),
        ("{codes", "is not a template (expected '}' before end of string)"),
        ("{{codes}}", "has to end with {codes}"),
    ],
)
def test_a_template_that_cant_be_filled_in_is_refused(item, message):
    with pytest.raises(UserError) as error:
        item_texts.check_template(item)
    assert str(error.value).startswith("config.prompt.item: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_titles_are_refused():
    with pytest.raises(UserError, match=r"^config\.prompt\.item: has {title}, but the dataset has no item texts"):
        make(train(gpt2), "\n{title} {codes}", titles=None)


def test_a_tokenizer_without_the_codes_is_a_bug():
    strings = SemanticIds(IDS.codes, (4, 4, 5)).token_strings()
    with pytest.raises(ValueError, match="lacks 1 semantic-ID tokens, among them <c_4>"):
        item_texts.read(train(gpt2), strings, None, prefix="", item="{codes}", max_title_tokens=1)


def config(**changes):
    """config.prompt with these changes."""
    options = default_config.get_config().prompt
    options.update(changes)
    return options


ITEMS = prompts.ItemContents(len(TITLES), IDS, TITLES)


def test_the_prompt_follows_the_model_and_the_config():
    """Without a tokenizer histories are codes. With it they also have text and the tokenizer's own beginning."""
    tokenizer = train(llama2)
    by_item = prompts.create("item", config(), prompts.ItemContents(len(TITLES)), None)
    assert read_by(by_item, [4, 1]).tolist() == [4, 1]
    assert len(read_by(prompts.create("tokens", config(), ITEMS, None), [4, 1])) == 6
    assert len(read_by(prompts.create("tokens", config(), ITEMS, tokenizer), [4, 1])) == 7
    text = config(prefix=PREFIX, item="\n{title} {codes}")
    expected = make(tokenizer, "\n{title} {codes}", PREFIX)
    np.testing.assert_array_equal(
        read_by(prompts.create("tokens", text, ITEMS, tokenizer), [4, 1]), read_by(expected, [4, 1])
    )


@pytest.mark.parametrize(
    ("prompt", "windows", "row_length"),
    [
        (prompts.item_prompt(6), "history", 64),
        (prompts.token_prompt(IDS.tokens), "history", 3 * 30),
        (prompts.token_prompt(IDS.tokens), "one_target", 3 * 30),
        # These windows also hold their last target.
        (prompts.token_prompt(IDS.tokens), "with_target", 3 * 31),
    ],
)
def test_a_row_length_of_zero_fits_the_longest_prompt(prompt, windows, row_length, caplog):
    """It is at least 64, so that several short histories are packed into a row."""
    assert prompts.choose_row_length(0, prompt, 30, windows) == row_length
    prompt.check_fits(row_length, 30)
    assert not caplog.text


def test_the_longest_prompt_has_the_prefix_and_the_items_with_the_most_tokens():
    prompt = make(train(gpt2), "\n{title} {codes}", PREFIX)
    expected = len(prompt.prefix) + 30 * max(map(len, prompt.pieces))
    assert prompts.choose_row_length(0, prompt, 30, "history") == expected


def test_a_row_length_that_is_given_is_kept_with_a_warning_if_histories_are_cut(caplog):
    prompt = prompts.token_prompt(IDS.tokens)
    assert prompts.choose_row_length(60, prompt, 20, "history") == 60
    assert not caplog.text
    assert prompts.choose_row_length(59, prompt, 20, "history") == 59
    assert "row_length: 59 holds about 19 items of a history, fewer than config.data.max_items = 20" in caplog.text


def test_a_row_length_that_holds_no_item_is_refused():
    with pytest.raises(UserError, match=r"^config\.training\.row_length: 2 is too short for the item with the longest"):
        prompts.choose_row_length(2, prompts.token_prompt(IDS.tokens), 20, "history")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"item": "{x} {codes}"}, r"^config\.prompt\.item: the placeholder \{x\}"),
        (
            {"item": "{title}{codes}"},
            r"^config\.prompt\.item: has text, but the backbone has no tokenizer; set config\.backbone\.checkpoint",
        ),
        ({"prefix": "x"}, r"^config\.prompt\.prefix: has text, but the backbone has no tokenizer"),
    ],
)
def test_text_without_a_tokenizer_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        prompts.check(config(**changes), "tokens", has_tokenizer=False)


def test_text_for_a_backbone_with_a_tokenizer_is_allowed():
    prompts.check(config(prefix="x", item="{title}{codes}"), "tokens", has_tokenizer=True)
    prompts.check(config(), "tokens", has_tokenizer=False)
    prompts.check(config(), "item", has_tokenizer=False)
