"""The tokenizer loses nothing, is reproducible, and knows only the training split."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from examples.common.errors import DataError, WeightsError
from examples.llama.data import DataConfig, load_splits
from examples.llama.data.split import split_documents
from examples.llama.data.tokenizer import (
    encode,
    end_of_text,
    for_prompts,
    load_tokenizer,
    plain_text,
    save_text_tokenizer,
    train_tokenizer,
)

_TEXTS = [
    "the quick brown fox jumps over the lazy dog " * 5,
    "Größe, naïve, Привет, 你好, \U0001f600\u2028\x00\ttab\n\n  spaces  ",
    "<|endoftext|> is text here",
]


def test_encode_round_trip():
    tokenizer = train_tokenizer(_TEXTS[:1], 300)
    tokens = encode(plain_text(tokenizer, ""), _TEXTS)
    end = end_of_text(tokenizer)
    ends = np.flatnonzero(tokens == end)
    assert len(ends) == len(_TEXTS) and ends[-1] == len(tokens) - 1
    pieces = np.split(tokens, ends + 1)[:-1]
    assert [tokenizer.decode(piece[:-1].tolist()) for piece in pieces] == _TEXTS
    assert tokens.dtype == np.uint16


def test_a_document_ends_once():
    """As with T5: the matcher of special tokens leaves text alone, but the model has the piece."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"\u2581{word}", -1.0) for word in "abc")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    tokens = encode(plain_text(tokenizer, ""), ["a b</s> c", "b"])
    assert list(tokens) == [2, 3, 4, 1, 3, 1]


def test_encode_across_chunks_and_of_nothing():
    tokenizer = plain_text(train_tokenizer(_TEXTS, 300), "")
    documents = [str(i) for i in range(1300)]
    one_by_one = [token for text in documents for token in encode(tokenizer, [text])]
    np.testing.assert_array_equal(encode(tokenizer, documents), one_by_one)
    assert encode(tokenizer, []).shape == (0,)


def test_training_is_reproducible():
    # Many pairs of equal frequency: an unordered tie-break would show.
    texts = [f"{a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]
    assert len({train_tokenizer(texts, 330).to_str() for _ in range(5)}) == 1


def test_vocabulary_size():
    assert train_tokenizer(_TEXTS, 300).get_vocab_size() == 300
    assert train_tokenizer(["aa"], 1000).get_vocab_size() == 258
    with pytest.raises(DataError, match=r"vocab_size must be at least 257, .*got 256"):
        train_tokenizer(_TEXTS, 256)


def test_trained_on_the_training_split_alone(tmp_path):
    # Each document repeats a word of its own, so that a tokenizer that saw it has the word.
    words = ["".join("abcdefghij"[int(d)] * 2 for d in f"{i:03}") for i in range(60)]
    texts = [f"{word} " * 40 for word in words]
    for word, text in zip(words, texts, strict=True):
        (tmp_path / f"{word}.txt").write_text(text)
    config = DataConfig(data=(str(tmp_path),), vocab_size=600, cache_dir=tmp_path / "cache")
    vocabulary = set(load_splits(config).tokenizer.get_vocab())
    train, validation, test = split_documents(texts, config.split_seed)
    assert all("Ġ" + text.split()[0] in vocabulary for text in train)
    assert not any("Ġ" + text.split()[0] in vocabulary for text in validation + test)


def test_file_with_truncation_loses_no_text(tmp_path):
    tokenizer = train_tokenizer(_TEXTS, 300)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=1000)
    tokenizer.save(str(tmp_path / "t.json"))
    loaded = load_tokenizer(str(tmp_path / "t.json"))
    np.testing.assert_array_equal(
        encode(loaded, _TEXTS), encode(plain_text(train_tokenizer(_TEXTS, 300), ""), _TEXTS)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "not a tokenizer file"), (b"{}", "not a tokenizer file"), (b"\xff", "not a token")],
)
def test_bad_file(tmp_path, content, message):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(str(path))
    assert str(path) in str(caught.value)


def test_a_directory_has_one(tmp_path):
    train_tokenizer(["a text"], 300).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).tokenizer.get_vocab_size() > 256
    with pytest.raises(WeightsError, match="no such directory"):
        load_tokenizer(str(tmp_path / "t5-base"))


def test_file_without_end_of_text(tmp_path):
    path = str(tmp_path / "t.json")
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(path)
    with pytest.raises(DataError, match="no end-of-text token"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("tokens", "stated", "expected"),
    [
        (["<fin>"], ["<fin>"], "<fin>"),  # DeepSeek and others: no known name
        (["<|endoftext|>", "<|im_end|>"], ["<|im_end|>"], "<|endoftext|>"),  # SmolLM2-Instruct
        (["<|end_of_text|>", "<|eot_id|>"], ["<|eot_id|>"], "<|end_of_text|>"),  # LLaMA 3 Instruct
        (["<|im_end|>", "</s>"], ["</s>"], "</s>"),
        (["</s>", "<eos>"], ["<eos>"], "<eos>"),  # Gemma has HTML among its tokens
        (["<|im_end|>", "<fin>"], ["<fin>", "<|im_end|>"], "<|im_end|>"),
        (["<a>", "<b>"], ["<b>", "<a>"], "<b>"),
        (["</s>"], [], "</s>"),
    ],
)
def test_the_end_of_a_document_is_a_known_name_or_the_one_that_files_state(
    tmp_path, tokens, stated, expected
):
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.add_special_tokens(tokens)
    end = tokenizer.token_to_id(expected)
    ids = [tokenizer.token_to_id(name) for name in stated]
    found = plain_text(tokenizer, "", [99, *ids])
    assert found.end_of_text == end
    assert encode(found, ["a", "aa"]).tolist() == [0, end, 0, 0, end]
    save_text_tokenizer(*found, tmp_path)
    assert load_tokenizer(str(tmp_path)).end_of_text == end


@pytest.mark.parametrize(
    ("template", "tokens"),
    [
        ("$A", ["the"]),
        ("$A </s>", ["the"]),  # T5
        ("<s> $A", ["<s>", "the"]),  # LLaMA
        ("<s> $A </s>", ["<s>", "the"]),  # BERT
        ("</s> $A", ["</s>", "the"]),  # OPT
    ],
)
def test_a_prompt_has_no_token_after_it(template, tokens):
    tokenizer = train_tokenizer(_TEXTS[:1], 300)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    special = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    before = tokenizer.to_str()
    for start, expected in ((True, tokens), (False, ["the"])):
        changed = for_prompts(tokenizer, start=start)
        assert changed.encode("the").tokens == expected
        assert changed.encode("</s>").ids[-1] != tokenizer.token_to_id("</s>")  # Is text.
    assert tokenizer.to_str() == before


def test_a_text_without_tokens_is_an_error_of_one_line():
    tokenizer = Tokenizer(models.WordLevel({"A": 0, "<|endoftext|>": 1}, unk_token="[UNK]"))
    with pytest.raises(DataError, match=r"the tokenizer cannot encode the text .*UNK"):
        encode(plain_text(tokenizer, ""), ["A", "N"])
