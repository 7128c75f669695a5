"""An exported tokenizer is the one of training, in words that Transformers 4.57 and 5 both know.

tests/huggingface/test_transformers_versions.py lets 4.57 itself read exports.
"""

import json

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from simgr_jax.huggingface.llm_tokenizer import save_tokenizer
from tests.inputs.llm_tokenizers import FAMILIES, prefix_space, train

TEXTS = ["A customer bought, oldest first:\nRed running shoes<a_0><b_3>; Größe 38 <|end|>", " <c_1>東京 x", ""]


def saved(family, folder):
    tokenizer = train(family)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", normalized=False)]})
    save_tokenizer(tokenizer, folder)
    return tokenizer, json.loads((folder / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("family", (*FAMILIES, prefix_space), ids=lambda family: family.__name__)
def test_it_is_read_as_it_was(family, tmp_path):
    tokenizer, _ = saved(family, tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        assert [again(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again.all_special_tokens == tokenizer.all_special_tokens


def test_its_config_has_the_names_that_4_57_knows(tmp_path):
    _, config = saved(FAMILIES[0], tmp_path)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|end|>"]
    assert "extra_special_tokens" not in config  # 4.57 wants a dictionary there.


@pytest.mark.parametrize(("family", "expected"), [(FAMILIES[0], False), (prefix_space, True)])
def test_its_config_agrees_with_its_pre_tokenizer(family, expected, tmp_path):
    """4.57 would change the pre-tokenizer."""
    assert saved(family, tmp_path)[1]["add_prefix_space"] is expected
