"""A look at data in which everything that can be found is wrong once."""

import base64
import contextlib
import csv
import functools
import html
import io
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet
from lhotse.cut.describe import CutSetStatistics

from icetransfer import look as command
from icetransfer import score
from icetransfer.config import load_config
from icetransfer.data import corpora
from icetransfer.data.jsonl import read_jsonl_gz, write_jsonl_gz
from icetransfer.data.survey import columns, overlaps, pace
from icetransfer.data.survey.columns import survey
from icetransfer.data.survey.findings import look
from icetransfer.data.survey.letters import RARE, LeftOut, read_left_out
from icetransfer.data.text.normalizer import Normalizer
from icetransfer.experiment import _hold_folder, create_experiment
from icetransfer.stage.lock import locked

RATE = 14  # characters a second
WORDS = ("de", "het", "een", "kat", "hond", "boom", "fiets", "water", "schip", "regen", "morgen")


def write_corpus(folder: Path) -> Path:
    """A corpus of noise, as long as its text takes, with one of every defect."""
    draw = np.random.default_rng(4)
    texts, splits = {}, {}
    for number in range(90):
        name = f"{number:03d}"
        splits[name] = "test" if number < 10 else "dev" if number < 20 else "train"
        texts[name] = (
            " ".join(draw.choice(WORDS, size=draw.integers(4, 14))) + f" {WORDS[number % 11]}"
        )
    samples = {}
    for name, text in texts.items():
        seconds = len(text.replace(" ", "")) / RATE * draw.lognormal(0, 0.06)
        samples[name] = draw.uniform(-0.3, 0.3, int(seconds * 16000))
    # a long and a short text, each with the other's audio
    texts["050"], texts["051"] = " ".join(WORDS), "een kat"
    samples["050"], samples["051"] = samples["051"][:12000], draw.uniform(-0.3, 0.3, 16000 * 4)
    samples["060"] = samples["060"][: len(samples["060"]) // 3]  # too fast: most is cut off
    samples["copy"], splits["copy"] = samples["070"], "train"
    texts["copy"] = " ".join(reversed(texts["070"].split()))
    samples["leak"], texts["leak"], splits["leak"] = samples["003"], texts["003"], "train"
    texts["072"] = texts["012"]  # a sentence of dev
    texts["005"] += " ж"  # a stranger in the test set
    texts["080"] += " жж"  # and in training, where stage 1 leaves it out
    texts["081"] += " x"  # a rare letter
    folder.mkdir()
    rows = ["path\ttext\tspeaker\tsplit"]
    for name, text in texts.items():
        soundfile.write(folder / f"{name}.wav", samples[name], 16000)
        rows.append(f"{name}.wav\t{text}\ts{sum(map(ord, name)) % 4}\t{splits[name]}")
    (folder / "transcripts.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    root = tmp_path_factory.mktemp("look")
    folder = write_corpus(root / "corpus")
    words = ["language=nl", f"data.dir={root / 'data'}", "data.features={jobs: 1}"]
    words.append(f"data.corpora={{own: {{kind: folder, path: {folder}}}}}")
    made = create_experiment(root / "exp", load_config([], words))
    with pytest.raises(ValueError, match="1 training recordings are in a dev or test split too"):
        corpora.prepare(made)  # the manifests are there all the same, to be looked at
    return made


@pytest.fixture(scope="module")
def printed():
    return io.StringIO()


@pytest.fixture(scope="module")
def findings(experiment, printed):
    with contextlib.redirect_stdout(printed):
        return command.write_look(experiment)


def ids(findings, rows):
    return [found.id for row in rows for found in findings.utterances([int(row)])]


def test_swapped_texts_and_a_cut_recording_are_found(findings):
    assert set(ids(findings, findings.fast)) == {"050", "060"}
    assert ids(findings, findings.slow) == ["051"]
    assert set(ids(findings, findings.worst[:3])) == {"050", "051", "060"}
    assert "060" in ids(findings, findings.fastest[:2])
    assert (
        ids(findings, findings.longest)[0]
        == max(findings.utterances(range(len(findings.survey))), key=lambda found: found.seconds).id
    )


def test_a_copy_with_another_text_is_found(findings):
    assert set(ids(findings, findings.copies.differing)) == {"070", "copy"}
    assert findings.copies.all.groups == 2, "the leak is a copy too, of the same text"
    assert {"070", "copy"} <= set(ids(findings, findings.suspects))


def test_leaks_are_found_by_kind(findings):
    found = {(leak.held_out.split, leak.kind): leak for leak in findings.leaks}
    leak = found["test", "recording"]
    assert (leak.train, leak.of_held_out, leak.share) == (1, 1, 10.0)
    assert [ids(findings, pair) for pair in leak.pairs] == [["leak", "003"]]
    assert [ids(findings, pair) for pair in found["dev", "sentence"].pairs] == [["072", "012"]]
    assert found["test", "speaker"].share == 100
    assert not {("test", "id"), ("dev", "recording"), ("test", "place")} & found.keys()


def test_strangers_are_named_with_their_utterances(findings):
    of_char = {found.char: found for found in findings.strangers}
    stranger = of_char["ж"]
    assert (stranger.kind, stranger.train, stranger.held_out, stranger.left_out) == (
        *("outside", 0, 1, 1),
    )
    assert list(stranger.examples) == ["005", "080"]
    assert stranger.name == "ж U+0436 cyrillic small letter zhe"
    assert (of_char["x"].kind, of_char["x"].train, list(of_char["x"].examples)) == (
        *("rare", 1, ["081"]),
    )
    assert "q" in findings.unseen and "e" not in of_char
    assert findings.left_out.reasons.total() == 1


def test_the_numbers_are_lhotses(findings):
    for manifest in findings.survey.manifests:
        cuts = CutSet.from_file(manifest.path)
        theirs = CutSetStatistics().accumulate(cuts).cut_durations
        assert np.allclose(findings.survey.seconds[manifest.rows], theirs, rtol=1e-6)


def test_the_page_has_everything_and_needs_no_other_file(experiment, findings):
    text = (experiment.dir / "look" / "look.html").read_text(encoding="utf-8")
    assert text.count("<audio ") == 20 == text.count('src="data:audio/mpeg;base64,')
    assert not re.search(r'(src|href)="(?!data:audio|#|suspects\.tsv)', text)
    assert text.count("<figure>") == 5, "lengths, rates, text against audio, speakers, letters"
    shown = html.unescape(re.sub(r"<[^>]+>", " ", text))
    for words in ("text too long for the audio", "cyrillic small letter zhe", "leak = 003"):
        assert words in shown
    with (experiment.dir / "look" / "suspects.tsv").open(encoding="utf-8") as file:
        rows = {row["id"]: row for row in csv.DictReader(file, delimiter="\t")}
    assert rows.keys() == {"050", "051", "060", "070", "copy"}
    assert float(rows["051"]["z"]) < -pace.LIMIT and rows["051"]["text"] == "een kat"
    assert rows["copy"]["why"] == "same audio as one with another text"


def test_the_players_hold_the_recordings(experiment, findings):
    (found,) = findings.utterances(findings.worst[:1])
    played = command.clip(found)
    packed = base64.b64decode(played.source.partition(",")[2])
    samples, rate = soundfile.read(io.BytesIO(packed))
    assert rate == 16000 and len(samples) / rate == pytest.approx(found.seconds, abs=0.15)
    Path(found.path).rename(found.path + ".gone")
    try:
        missing = command.clip(found)
    finally:
        Path(found.path + ".gone").rename(found.path)
    assert missing.source is None and found.path in missing.lines[-1]


def test_it_fits_eighty_columns(findings, printed):
    lines = printed.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) > 60
    assert any("050" in line for line in lines)


def test_it_can_be_taken_while_the_experiment_trains(experiment):
    with locked(experiment.dir, "train", waits=False):
        with _hold_folder(experiment, Path("icetransfer/look.py"), shares=False):
            pass
        with (
            pytest.raises(ValueError, match="is in use by train"),
            _hold_folder(experiment, Path("icetransfer/average.py"), shares=False),
        ):
            pass


def make_survey(folder, texts, seconds, corpus="c", digests=None):
    """A survey of one training manifest, without audio."""
    cuts = [
        {
            "id": f"u{i}", "start": 0.0, "duration": s, "channel": 0, "type": "MonoCut",
            "supervisions": [{"id": f"u{i}", "recording_id": f"u{i}", "start": 0.0,
                              "duration": s, "channel": 0, "text": text}],
            "recording": {"id": f"u{i}", "sources": [{"type": "file", "channels": [0],
                          "source": f"{i}.wav"}], "sampling_rate": 16000,
                          "num_samples": round(s * 16000), "duration": s},
        }
        for i, (text, s) in enumerate(zip(texts, seconds, strict=True))
    ]  # fmt: skip
    for split in ("train", "dev", "test"):
        write_jsonl_gz(folder / f"{corpus}_{split}.jsonl.gz", cuts if split == "train" else [])
    return survey(folder, {corpus: "nl"})


def test_an_utterance_is_compared_with_those_of_as_much_text(tmp_path):
    """Short utterances are slower, for their pauses; the long one at their rate is not usual."""
    texts = ["a" * 10] * 150 + ["a" * 100] * 150
    draw = np.random.default_rng(1)
    seconds = np.concatenate([10 / 5 * np.ones(150), 100 / 15 * np.ones(150)])
    seconds = np.round(seconds * draw.lognormal(0, 0.05, 300), 4)
    seconds[299] = 100 / 6  # faster than every short one
    z = pace.scores(make_survey(tmp_path, texts, seconds.tolist()))
    assert np.flatnonzero(np.abs(z) > pace.LIMIT).tolist() == [299] and z[299] < -10


def test_equal_rates_are_no_outliers(tmp_path):
    z = pace.scores(make_survey(tmp_path, ["abcd"] * 40, [1.0] * 39 + [1.05]))
    assert np.abs(z).max() < pace.LIMIT, "speech of a machine: a deviation of nothing has a floor"


def test_a_model_finds_what_the_rate_does_not(tmp_path):
    found = make_survey(tmp_path, ["abcd"] * 40, [1.0] * 40)
    cers = np.full(40, 8.0, np.float32)
    cers[7], cers[9], cers[11] = 95.0, 45.0, np.nan
    findings = look(found, LeftOut(), cers)
    assert (findings.misheard.tolist(), findings.worst[0], findings.recognised) == ([7], 7, 39)
    assert findings.cer_limit == 50
    weak = look(found, LeftOut(), np.linspace(20, 80, 40, dtype=np.float32))
    assert weak.cer_limit > 80 and not len(weak.misheard), "of a weak model every CER is high"


def test_what_lhotse_does_not_accept_is_said(tmp_path):
    found = make_survey(tmp_path, ["ab"] * 3, [1.0, -1.0, 1.0])
    assert (found.problems[0].checked, found.problems[0].found) == (3, 1)
    assert found.problems[0].first.startswith("u1: ")


def test_the_same_text_is_counted_by_speaker_too(tmp_path):
    found = make_survey(tmp_path, ["ja", "nee", "ja", "ja", "nee", "misschien"], [1.0] * 6)
    groups = overlaps.groups_of(found.texts, np.arange(6), 10)
    assert (groups.groups, groups.more) == (2, 3)
    assert [rows.tolist() for rows in groups.largest] == [[0, 2, 3], [1, 4]]


def test_common_letters_are_counted_no_further(tmp_path):
    letters = make_survey(
        tmp_path, ["ab"] * (RARE + 5) + ["aж"] * (RARE + 5), [1.0] * (2 * RARE + 10)
    )
    (own,) = [x for x in letters.letters if x.counts]
    assert own.utterances["ж"] == RARE + 5, "strangers to the end"
    assert own.utterances["a"] == RARE and own.counts["a"] == 2 * RARE + 10
    assert read_left_out([tmp_path / "none.tsv"]) == LeftOut()


def test_only_the_lines_that_are_shown_are_read(tmp_path, monkeypatch):
    found = make_survey(tmp_path, ["a"] * 30, [1.0] * 30)
    parsed = []
    monkeypatch.setattr(
        columns.json, "loads", lambda line: parsed.append(line) or {"line": len(parsed)}
    )
    assert [row for row, _ in columns.pick(found, [29, 3, 3])] == [3, 29]
    assert len(parsed) == 2


def test_no_utterance_at_all_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="the manifests hold no utterance; see stage 1's log"):
        make_survey(tmp_path, [], [])


@pytest.fixture
def with_model(tone_recipe, save_random_model, monkeypatch):
    made = tone_recipe("look-cer", "hours=0.3min")
    save_random_model(made)
    monkeypatch.setattr(command, "PART", 10)
    return made


def test_every_training_utterance_gets_its_cer_and_a_kill_costs_a_part(with_model, monkeypatch):
    write, done = command.write_jsonl_gz, []

    def killed(path, rows):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path)
        write(path, rows)

    found = command.read_survey(with_model)
    heard = command.Recognised.of(with_model)
    monkeypatch.setattr(command, "write_jsonl_gz", killed)
    with pytest.raises(KeyboardInterrupt):
        command.recognise(with_model, found)
    assert np.isfinite(heard.cers(found)).sum() == 20, "what is done is shown"
    before = [path.stat().st_mtime_ns for path in done]
    monkeypatch.setattr(command, "write_jsonl_gz", lambda *a: done.append(a[0]) or write(*a))
    findings = command.write_look(with_model, with_cer=True)
    assert findings.recognised == 36 and len(done) == 4, "36 utterances in parts of 10"
    assert [path.stat().st_mtime_ns for path in done[:2]] == before
    normalize = Normalizer("nl")
    words = functools.partial(heard.heard, found)
    for utterance in findings.utterances(range(36), words):
        pair = [{"ref": normalize(utterance.text), "hyp": utterance.heard}]
        assert utterance.cer == pytest.approx(score.character_errors(pair).rate, abs=0.01)
    lines = [line for path in done for line in read_jsonl_gz(path)]
    assert [line["id"] for line in lines] == [f"train-{n:02d}" for n in range(36)]
    text = (with_model.dir / "look" / "look.html").read_text(encoding="utf-8")
    assert "heard: " in text and "CER of the training utterances" in text
    with with_model.averaged_checkpoint.open("ab") as file:
        file.write(b" ")
    other = command.Recognised.of(with_model)
    assert not np.isfinite(other.cers(found)).any(), "of another model"


def test_without_a_model_there_is_no_cer(tone_recipe):
    made = tone_recipe("look-none", "hours=0.3min")
    found = command.read_survey(made)
    assert not np.isfinite(command.Recognised.of(made).cers(found)).any()
    with pytest.raises(ValueError, match=r"averaged.pt does not exist: run stage 7, which makes"):
        command.recognise(made, found)
