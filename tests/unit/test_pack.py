"""What is handed over: that its lines run as written, elsewhere, with nothing of ours."""

import dataclasses
import json
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from subprocess import DEVNULL

import numpy as np
import pytest
import soundfile
import yaml

from icetransfer import decode, export, model_card, pack
from icetransfer.bundle import check, endpoint
from icetransfer.bundle.settings import RULES, read_settings
from icetransfer.experiment import Experiment, create_experiment
from icetransfer.model.checkpoint import save_checkpoint
from icetransfer.model.transducer import build_transducer
from icetransfer.onnx.share import bytes_on_disk
from icetransfer.streaming.exported import Exported
from tests import hub

# Refuses what comes neither with Python nor with sherpa-onnx, soundfile and what they require.
ALONE = """\
import sys
ALLOWED = {"sherpa_onnx", "soundfile", "_soundfile", "_soundfile_data"}
ALLOWED |= {"numpy", "cffi", "_cffi_backend", "typing_extensions"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in ALLOWED and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"{name} is not installed")
sys.meta_path.insert(0, Refuse())
exec(sys.argv[1])
"""


@pytest.fixture(scope="module")
def experiment(prepare, nano_dims, tmp_path_factory) -> Experiment:
    """Two tiers, exported and decoded, of a model that was not trained."""
    run = prepare(
        "pack",
        "decode.engines=[sherpa]",
        "decode.precisions=[fp32,int8,int4]",
        "decode.chunk_sizes=[8,-1]",
        "decode.left_context_frames=16",
        "bundle.tar=true",
    )
    tokens = len((run.lang_dir / "tokens.txt").read_text().splitlines())
    model = build_transducer(dataclasses.replace(nano_dims, vocab_size=tokens), seed=4)
    save_checkpoint(run.averaged_checkpoint, model)
    export.export_tiers(run)
    decode.decode_all(run)
    pack.pack_tiers(run)
    return run


@pytest.fixture(params=["chunk-8-left-16", "offline"])
def folder(experiment, request, tmp_path):
    """A bundle, alone at a place where nothing else of ours is."""
    return shutil.copytree(experiment.bundle_dir / request.param, tmp_path / "else where")


def fenced(folder, language, choose=lambda text: True):
    found = re.findall(rf"```{language}\n(.*?)```", (folder / "README.md").read_text(), re.S)
    (chosen,) = filter(choose, found)
    return chosen


def words_of(folder, choose):
    """The words of a command of the README, with the program's path."""
    words = fenced(folder, "bash", choose).replace("\\\n", " ").split()
    program = shutil.which(words[0], path=str(Path(sys.executable).parent))
    assert program is not None
    return [program, *words[1:]]


def said(folder, precision):
    row = rf"^\| {precision} \| .* \| `(.*)` \|$"
    found = re.search(row, (folder / "README.md").read_text(), re.M)
    assert found is not None
    return found[1]


def run(command, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done, done.stdout + done.stderr


def test_the_python_lines_print_what_the_readme_says(folder) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, fenced(folder, "python")],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == said(folder, "int8") != ""


def test_the_hook_refuses_what_is_not_theirs(folder) -> None:
    command = [sys.executable, "-I", "-c", ALONE, "import onnx"]
    assert "onnx is not installed" in subprocess.run(command, capture_output=True, text=True).stderr


def test_the_program_prints_what_python_does(folder) -> None:
    done, printed = run(
        words_of(folder, lambda text: "modified" not in text and "port" not in text), folder
    )
    assert done.returncode == 0, printed
    (text,) = re.findall(r'"text": "(.*?)"', printed)
    if (folder / "bundle.json").read_text().count('"chunk_size": -1'):
        assert text  # without the silence that Python gives, the end may be another
    else:
        assert text.strip() == said(folder, "int8")


def test_hotwords_as_written(folder) -> None:
    (folder / "hotwords.txt").write_text("een twee\n")
    done, printed = run(words_of(folder, lambda text: "hotwords" in text), folder)
    assert done.returncode == 0, printed
    assert '"text": "' in printed


def test_the_websocket_server_as_written(experiment, tmp_path) -> None:
    folder = shutil.copytree(experiment.bundle_dir / "chunk-8-left-16", tmp_path / "tier")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = words_of(folder, lambda text: "--port" in text)
    command = [word.replace("6006", port) for word in command]
    client = [
        word.replace("6006", port) for word in words_of(folder, lambda text: "client" in text)
    ]
    with subprocess.Popen(command, cwd=folder, stdout=DEVNULL, stderr=DEVNULL) as server:
        try:
            for _ in range(100):
                with socket.socket() as trial:
                    if trial.connect_ex(("127.0.0.1", int(port))) == 0:
                        break
                time.sleep(0.1)
            done, printed = run(client, folder)
        finally:
            server.terminate()
    assert done.returncode == 0 and '"text"' in printed, printed


def test_the_check_alone_and_what_it_finds(folder) -> None:
    """check.py needs sherpa-onnx and numpy; it runs inside the bundle and names what is wrong."""
    alone = ALONE.replace('"soundfile", "_soundfile", "_soundfile_data"', "")
    code = 'import runpy; del sys.argv[1:]; runpy.run_path("check.py", run_name="__main__")'
    command = [sys.executable, "-I", "-c", alone, code]
    done, printed = run(command, folder)
    assert done.returncode == 0, printed
    assert printed.count("\nsame") + printed.startswith("same") == 6
    assert "all 6 as they were" in printed
    (folder / "bundle.json").write_text("{}")
    done, printed = run(command, folder)
    assert done.returncode == 2 and "bundle.json is damaged" in printed
    (folder / "joiner.int4.onnx").unlink()
    done, printed = run(command, folder)
    assert done.returncode == 2 and "joiner.int4.onnx is missing" in printed


def test_a_text_that_differs_is_shown_beside_the_old_one(capsys) -> None:
    rows = [("sherpa-onnx, Python", "fp32", "een"), ("sherpa-onnx, Python", "int8", "twee")]
    assert check.report({"test": {"fp32": "een", "int8": "drie"}}, rows) == 1
    printed = capsys.readouterr().out
    assert re.search(r"^same .* een$", printed, re.M)
    assert re.search(r"^DIFFERS .* twee\n +when it was packed .* drie$", printed, re.M)


def test_every_engine_says_the_same(folder, capsys) -> None:
    assert pack.check_bundle(folder) == 0
    assert capsys.readouterr().out.count("onnxruntime, icetransfer") == 3
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="is not a bundle: it has no SHA256SUMS"):
        pack.check_bundle(folder)


def test_checksums_hold_every_file(folder) -> None:
    done, printed = run(["sha256sum", "-c", "--strict", "SHA256SUMS"], folder)
    assert done.returncode == 0, printed
    names = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert names == {path.name for path in folder.iterdir()} - {"SHA256SUMS"}


def test_rules_are_of_sherpa_onnx_where_the_dev_set_is_small(folder) -> None:
    settings = read_settings(folder)
    assert settings.rules == RULES and settings.min_confidence == 0
    assert "fewer than 20" in settings.reasons["default"]


def test_rules_are_chosen_and_kept(experiment, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(endpoint, "ENOUGH", 2)
    run = create_experiment(tmp_path / "run", experiment.config)
    source = Exported(experiment.onnx_dir(8))
    chosen = pack.choose_settings(run, source, 8)
    assert chosen.pause >= endpoint.FLOOR and chosen.reasons["utterances"] > 2
    assert chosen.reasons["measured"] == {}  # the model was not trained, and says words in silence
    monkeypatch.setattr(endpoint, "hear", None)  # not again
    assert pack.choose_settings(run, source, 8) == chosen


def test_no_commit_is_said(experiment) -> None:
    assert model_card._commit({"git_commit": None}).startswith("not known")
    assert "None" not in (experiment.bundle_dir / "offline" / "MODEL_CARD.md").read_text()


def test_a_bundle_is_whole(folder, experiment) -> None:
    bundle = Exported(folder)
    for precision in ("fp32", "int8", "int4"):
        bundle.inspect(precision)
    samples, rate = soundfile.read(folder / "test.wav")
    assert rate == 16000 and 0.5 < len(samples) / rate < pack.LONGEST
    assert np.abs(samples).max() > 0.1
    assert (folder / "test.txt").read_text().split()
    assert (folder / "bpe.model").read_bytes() == (experiment.lang_dir / "bpe.model").read_bytes()


def test_tiers_share_their_weights(experiment, folder) -> None:
    tiers = ("chunk-8-left-16", "offline")
    packed = [Exported(experiment.bundle_dir / tier) for tier in tiers]
    for precision in ("fp32", "int8", "int4"):
        first, second = (bundle.weights(precision) for bundle in packed)
        assert first.samefile(second)
        files = [b.model("encoder", precision) for b in packed]
        exported = [experiment.dir / "onnx" / path.parent.name / path.name for path in files]
        assert bytes_on_disk([first, second, *files]) < bytes_on_disk(exported)
    assert not list(experiment.bundle_dir.glob(".partial*"))
    assert "hard links" in (folder / "README.md").read_text()
    alone = Exported(folder)
    weights = alone.weights("int8")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"encoder.int8.weights has \d+ bytes and .*cut short"):
        alone.inspect("int8")
    for broken in (lambda: alone.description.unlink(), weights.unlink):
        broken()
        with pytest.raises(ValueError, match=r"has weights in encoder.int8.weights, which is miss"):
            alone.inspect("int8")
    with pytest.raises(ValueError, match=r"encoder.int8.weights is missing"):
        check.read_bundle(folder)


def test_the_card_has_the_numbers_of_the_results(experiment) -> None:
    for tier, label in (("chunk-8-left-16", "160 ms"), ("offline", "offline")):
        text = (experiment.bundle_dir / tier / "MODEL_CARD.md").read_text()
        assert label in text.splitlines()[0]
        results = [*experiment.decode_dir.glob(f"*/*{tier}*/wer.json")]
        assert len(results) == 3
        for path in results:
            result = json.loads(path.read_text())
            assert f"| {result['precision']} | {result['wer']:.2f} | {result['cer']:.2f} |" in text
        assert "block_size 32" in text and "your own recordings" in text
        assert "tones: " in text and " h, " in text  # hours of data


def test_an_archive_when_asked(experiment) -> None:
    with tarfile.open(experiment.bundle_dir / "offline.tar") as archive:
        names = archive.getnames()
    assert {"offline/encoder.int4.onnx", "offline/README.md", "offline/tokens.txt"} <= {*names}


def test_a_damaged_export_is_not_packed(experiment, tmp_path) -> None:
    broken = create_experiment(tmp_path / "broken", experiment.config)
    shutil.copytree(experiment.dir / "onnx", broken.dir / "onnx")
    path = broken.dir / "onnx" / "offline" / "joiner.int4.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    sample = pack.find_sample(experiment)
    with pytest.raises(ValueError, match=r"joiner.int4.onnx has \d+ bytes"):
        pack.pack_tier(broken, Exported(path.parent), -1, sample, broken.bundle_dir / "offline")
    assert not broken.bundle_dir.exists()


def test_the_language_model_goes_with_a_streaming_tier(experiment, tmp_path) -> None:
    decoding = experiment.config.decode.model_copy(update={"language_model_scale": 0.3})
    config = experiment.config.model_copy(update={"decode": decoding})
    run = dataclasses.replace(experiment, dir=tmp_path / "run", config=config)
    with pytest.raises(ValueError, match=r"lstm.onnx does not exist: run stage 8"):
        pack.add_language_model(run, 8, tmp_path)
    run.language_model_dir.mkdir(parents=True)
    run.language_model.with_suffix(".onnx").write_bytes(b"model")
    found = pack.add_language_model(run, 8, tmp_path)
    assert found == {"lm": "language-model.onnx", "lm_scale": 0.3}
    assert (tmp_path / found["lm"]).read_bytes() == b"model"
    assert pack.add_language_model(run, -1, tmp_path) == {}
    assert pack.add_language_model(experiment, 8, tmp_path) == {}


def test_a_dry_run_of_push_lists_what_would_go(experiment, capsys) -> None:
    pack.push(experiment, "org/name", dry_run=True)
    printed = capsys.readouterr().out.splitlines()
    names = [line.split(maxsplit=1)[1] for line in printed[:-1]]
    folders = ("chunk-8-left-16", "offline")
    there = [f"{x}/{path.name}" for x in folders for path in (experiment.bundle_dir / x).iterdir()]
    assert sorted(names) == sorted(["README.md", *there])
    assert f"in {len(names)} files would go to org/name" in printed[-1]


def test_push_makes_a_private_repository_with_every_tier_and_a_card(
    experiment, monkeypatch, tmp_path
) -> None:
    with hub.serving(monkeypatch, tmp_path) as served:
        pack.push(experiment, "org/name", dry_run=False)
        assert served.created[0]["name"] == "name"
        assert served.created[0].get("private", served.created[0].get("visibility"))
        assert len([line for line in served.asked if "/commit/" in line]) == 1
    folder = experiment.bundle_dir / "offline"
    for path in folder.iterdir():
        assert served.files[f"org/name/offline/{path.name}"] == path.read_bytes()
    card = served.files["org/name/README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["language"] == ["nl"] and head["library_name"] == "sherpa-onnx"
    for link in re.findall(r"\]\(([^)]+)\)", card):
        assert f"org/name/{link}" in served.files
    wer = json.loads(
        next(experiment.decode_dir.glob("*/sherpa-int8-offline*/wer.json")).read_text()
    )
    assert f"| sherpa | int8 | {wer['wer']:.2f} |" in card


def test_push_refuses_what_is_not_a_repository_or_not_as_it_was_packed(
    experiment, monkeypatch, tmp_path
) -> None:
    with pytest.raises(ValueError, match="as ORG/NAME"):
        pack.push(experiment, "name", dry_run=True)
    with hub.serving(monkeypatch, tmp_path) as served:
        served.refuse = 401
        with pytest.raises(ValueError, match=r"the upload to org/name failed .*hf auth login"):
            pack.push(experiment, "org/name", dry_run=False)
    tokens = experiment.bundle_dir / "offline" / "bpe.vocab"
    before = tokens.read_bytes()
    tokens.write_bytes(before + b"x")
    with pytest.raises(ValueError, match=r"offline: bpe\.vocab is damaged.*stage 11 again"):
        pack.push(experiment, "org/name", dry_run=True)
    tokens.write_bytes(before)


def test_packing_ends_with_the_error_rate_and_the_next_command(
    experiment, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(pack, "pack_tier", lambda *_: None)
    monkeypatch.setattr(pack.log, "propagate", True)
    with caplog.at_level("INFO", logger="icetransfer"):
        pack.pack_tiers(experiment)
    rate, following = caplog.messages[-2:]
    assert re.fullmatch(r"WER [\d.]+ % \(\w+, sherpa, 160 ms \(\+130 ms look-ahead\)\)", rate)
    folder = experiment.bundle_dir
    assert following == (
        f"next: python -m icetransfer.transcribe --bundle {folder} --latency 160 FILE..."
    )
    assert pack.main_tier([8, 16, 32, -1]) == 16 and pack.main_tier([-1]) == -1
