"""The text for language models: whose sentences it holds, what is left out, and its errors."""

import gzip
import json

import pytest

from icetransfer.config import load_config
from icetransfer.data.features import read_manifest
from icetransfer.data.language_text import collect_text
from icetransfer.data.subset import training_texts
from icetransfer.experiment import create_experiment


@pytest.fixture
def with_text(tone_recipe, tmp_path):
    """Makes an experiment of the tones whose `data.text` are these files, by name."""
    plain = tone_recipe("text")

    def make(files, source="text"):
        folder = tmp_path / "text"
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        more = [f"data.text=[{folder}]", f"language_model.text={source}"]
        overrides = [f"data.dir={plain.data_dir}", "language=nl", "data.vocab_size=30"]
        corpora = "data.corpora={tones: {kind: folder, path: unused}}"
        run = tmp_path / f"run-{len([*tmp_path.iterdir()])}"
        return create_experiment(run, load_config([], [corpora, *overrides, *more]))

    return make


def test_sentences_are_cleaned_kept_once_and_never_those_of_dev_and_test(with_text) -> None:
    trained = [*training_texts(with_text({"a.txt": "een"}))]
    held_out = []
    experiment = with_text({})
    for split in ("dev", "test"):
        cuts = read_manifest(experiment.manifests_dir / f"tones_{split}.jsonl.gz")
        held_out += [cut.supervisions[0].text for cut in cuts]
    prose = "Een goede dag! Het kost 12 euro. Een goede dag. " + f"{held_out[0].capitalize()}."
    experiment = with_text(
        {
            "a.txt": f"\ufeff{prose}\nmet een дом\n\n!!!\n{trained[0].upper()}\n",
            "b.gz": gzip.compress(f"{held_out[-1]}\ndag {'lang ' * 100}\nnieuw\n".encode()),
            "ignored.pdf": b"\xff",
        }
    )
    path = collect_text(experiment)
    lines = path.read_text().splitlines()
    once = [*dict.fromkeys(text for text in trained if text not in held_out)]
    assert lines == [*once, "een goede dag", "het kost twaalf euro", "nieuw"]
    counts = json.loads(path.with_suffix(".json").read_text())
    first, second = (
        counts[str(experiment.config.data.text[0] / name)] for name in ("a.txt", "b.gz")
    )
    assert first["kept"] == 2 and first["held_out"] == 1 and first["foreign"] == 1
    assert first["empty"] == 1 and first["repeated"] == 2 and first["words"] == 7
    assert second == dict.fromkeys(second, 0) | {
        "sentences": 3, "kept": 1, "words": 1, "held_out": 1, "too_long": 1,
    }  # fmt: skip
    assert counts["transcripts"]["kept"] == len(once)


def test_transcripts_alone_and_a_second_run(with_text, caplog) -> None:
    experiment = with_text({"a.txt": "nieuw"}, "transcripts")
    path = collect_text(experiment)
    assert "nieuw" not in path.read_text()
    caplog.set_level("INFO", logger="icetransfer")
    collect_text(experiment)
    assert f"skip: {path} is complete" in caplog.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": "\n \n"}, r"a.txt holds no text"),
        ({"a.txt": "goed\nдом\nдва\n"}, r"a.txt: 2 of 3 .* Dutch does not have \(line 2 has 'дмо'"),
        ({"a.txt": b"goed\nb\xe9ter\n"}, r"a.txt:2 is not UTF-8"),
        ({"a.gz": gzip.compress(b"goed\n" * 99)[:-9]}, r"a.gz is not a whole gzip file"),
        ({"a.gz": b"goed\n"}, r"a.gz is not a whole gzip file"),
        ({"a.pdf": b"x"}, r"holds no file that ends in .txt"),
    ],
)
def test_bad_text_is_refused_and_nothing_is_left(with_text, files, message) -> None:
    experiment = with_text(files)
    with pytest.raises(ValueError, match=message):
        collect_text(experiment)
    assert not (experiment.language_model_dir / "text.txt").exists()


def test_text_that_is_not_there(with_text) -> None:
    experiment = with_text({"a.txt": "x"})
    (experiment.config.data.text[0] / "a.txt").unlink()
    experiment.config.data.text[0].rmdir()
    with pytest.raises(ValueError, match="does not exist; name files or folders"):
        collect_text(experiment)
