import pytest

from icetransfer.data.tokenizer import Tokenizer, train_tokenizer, write_tokens

SENTENCES = [f"de {a} zat bij het {b}" for a in ("kat", "hond", "muis") for b in ("raam", "vuur")]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(train_tokenizer(SENTENCES, 40))


def test_special_tokens_come_first_and_the_size_is_as_asked(tokenizer):
    assert tokenizer.tokens[:3] == ["<blk>", "<sos/eos>", "<unk>"]
    assert tokenizer.vocab_size == 40 == len(set(tokenizer.tokens))


def test_text_survives_encoding_and_decoding(tokenizer):
    for text in SENTENCES:
        ids = tokenizer.encode(text)
        assert min(ids) > 2
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([0, *tokenizer.encode("de kat"), 1]) == "de kat"
    assert tokenizer.encode("") == []


def test_the_same_text_gives_the_same_bytes():
    assert train_tokenizer(SENTENCES, 40) == train_tokenizer(iter(SENTENCES), 40)


def test_unknown_characters_are_named(tokenizer):
    assert tokenizer.unknown_characters("de kat") == ""
    assert tokenizer.unknown_characters("de žaba ž水") == "ž水"
    assert 2 in tokenizer.encode("žaba")


def test_too_large_a_vocabulary_becomes_the_largest_possible(caplog):
    with caplog.at_level("WARNING", logger="icetransfer"):
        model = train_tokenizer(SENTENCES, 5000)
    size = Tokenizer(model).vocab_size
    assert 40 < size < 200
    assert "5000" in caplog.text and str(size) in caplog.text


def test_too_small_a_vocabulary_says_the_least():
    with pytest.raises(ValueError, match="at least") as error:
        train_tokenizer(SENTENCES, 10)
    least = int(str(error.value).rpartition(" ")[2])
    assert Tokenizer(train_tokenizer(SENTENCES, least)).vocab_size == least


def test_no_text_is_an_error():
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer(["", " "], 40)


def test_tokens_file_is_as_sherpa_reads_it(tokenizer, tmp_path):
    write_tokens(tokenizer, tmp_path / "tokens.txt")
    lines = (tmp_path / "tokens.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "<blk> 0"
    assert [line.split(" ") for line in lines] == [
        [token, str(i)] for i, token in enumerate(tokenizer.tokens)
    ]


def test_a_model_of_another_convention_is_refused(tmp_path):
    import io

    import sentencepiece

    other = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=other, vocab_size=40, model_type="bpe",
        minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="first tokens"):
        Tokenizer(other.getvalue())
    with pytest.raises(ValueError, match="does not exist"):
        Tokenizer(tmp_path / "bpe.model")
