import io

import pytest
import sentencepiece

from icetransfer.data.subset import subset_path, training_texts
from icetransfer.data.tokenizer import Tokenizer, make_tokenizer, train_tokenizer, write_tokens
from icetransfer.experiment import Experiment
from icetransfer.streaming.alignment import spoken_words
from icetransfer.streaming.exported import read_tokens
from icetransfer.streaming.search import Hypothesis

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


def test_words_with_their_counts_give_the_pieces_of_whole_sentences() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, model_type="bpe", vocab_size=40,
        character_coverage=1.0, normalization_rule_name="identity", unk_id=2, bos_id=-1, eos_id=-1,
        user_defined_symbols=["<blk>", "<sos/eos>"], minloglevel=2,
    )  # fmt: skip
    assert Tokenizer(train_tokenizer(SENTENCES, 40)).tokens == Tokenizer(model.getvalue()).tokens


def test_characters_are_tokens_however_many_there_are():
    text = ["今日は良い天気です", "ดี"]
    tokenizer = Tokenizer(train_tokenizer(text, 8, "characters"))
    assert tokenizer.vocab_size == 3 + len(set("".join(text)))
    assert [tokenizer.decode(tokenizer.encode(sentence)) for sentence in text] == text
    assert tokenizer.units("今日 ดี") == ["今", "日", "ดี"]


def test_errors_are_counted_in_words_of_pieces(tokenizer):
    assert tokenizer.units("de kat zat") == ["de", "kat", "zat"]


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


def test_bytes_of_characters_that_a_vocabulary_lacks(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, vocab_size=290, model_type="bpe",
        byte_fallback=True, user_defined_symbols=["<blk>", "<sos/eos>"], unk_id=2, bos_id=-1,
        eos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    fallback = Tokenizer(model.getvalue())
    path = tmp_path / "tokens.txt"
    write_tokens(fallback, path)
    names = read_tokens(path)
    assert names == fallback.tokens and names[3 + 0xE8] == "<0xE8>"
    ids = fallback.encode("de kat 说")
    assert [names[i] for i in ids[-3:]] == ["<0xE8>", "<0xAF>", "<0xB4>"]
    assert fallback.unknown_characters("说") == ""
    for said, text in ((ids, "de kat 说"), (ids[:-1], "de kat \ufffd\ufffd")):
        words = spoken_words(Hypothesis(said, [*range(len(said))]), names)
        assert fallback.decode(said) == " ".join(word.text for word in words) == text


def test_a_model_of_another_convention_is_refused(tmp_path):
    other = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=other, vocab_size=40, model_type="bpe",
        minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="first tokens"):
        Tokenizer(other.getvalue())
    with pytest.raises(ValueError, match="does not exist"):
        Tokenizer(tmp_path / "bpe.model")


def test_tokens_are_of_the_experiments_own_hours(tone_recipe):
    short, long = tone_recipe("short", "hours=0.1min"), tone_recipe("long", "hours=0.5min")
    assert short.lang_dir != long.lang_dir
    assert set(training_texts(short)) < set(training_texts(long))
    few = Tokenizer(short.lang_dir / "bpe.model")
    expected = train_tokenizer([*training_texts(short)], short.config.data.vocab_size)
    assert few.tokens == Tokenizer(expected).tokens
    many = Tokenizer(long.lang_dir / "bpe.model")
    assert few.tokens != many.tokens, "its two sentences do not hold what half a minute does"
    lines = subset_path(short).read_text().splitlines()
    assert len([*training_texts(short)]) == len(lines)


def test_the_other_init_and_seed_have_the_same_tokens(tone_recipe):
    one = tone_recipe("one", "hours=0.5min", "init=en", "seed=1")
    written = (one.lang_dir / "bpe.model").read_bytes()
    (one.lang_dir / "bpe.model").unlink()
    other = tone_recipe("other", "hours=0.5min", "init=ml", "seed=2")
    assert (other.lang_dir / "bpe.model").read_bytes() == written


def with_text(experiment, *paths):
    """The experiment with text of the user's, and no tokens yet."""
    config = experiment.config
    data = config.data.model_copy(update={"tokenizer_text": paths})
    for path in experiment.lang_dir.iterdir():
        path.unlink()
    return Experiment(experiment.dir, config.model_copy(update={"data": data}))


def test_text_of_the_users_is_added(tone_recipe, tmp_path, caplog):
    text = tmp_path / "text.txt"
    text.write_text("\ufeffZebra's, zwaluwen!\n\nводка\n zwaan zwam zwart\n", encoding="utf-8")
    experiment = with_text(tone_recipe("text", "hours=0.7min"), text)
    with caplog.at_level("INFO", logger="icetransfer"):
        make_tokenizer(experiment)
    assert "2 lines, 1 with foreign letters left out" in caplog.text
    tokens = Tokenizer(experiment.lang_dir / "bpe.model")
    assert tokens.unknown_characters("zebras zwaluwen") == ""
    assert tokens.unknown_characters("водка") == "водка"


def test_text_that_cannot_be_read_is_named(tone_recipe, tmp_path):
    experiment = tone_recipe("bad", "hours=0.6min")
    for name, content, message in (
        ("missing.txt", None, "does not exist"),
        ("audio.txt", b"RIFF\xff\xfe\x00", "not text in UTF-8"),
        ("russian.txt", "водка\n".encode(), "no line of Dutch"),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} .*{message}|{message}.*{name}"):
            make_tokenizer(with_text(experiment, path))
    subset_path(experiment).unlink()
    with pytest.raises(ValueError, match="run stage 3"):
        make_tokenizer(with_text(experiment))
