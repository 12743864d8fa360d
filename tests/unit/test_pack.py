"""What is handed over: that its lines run as written, elsewhere, with nothing of ours."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from icetransfer import decode, export, pack
from icetransfer.experiment import Experiment, create_experiment
from icetransfer.model.checkpoint import save_checkpoint
from icetransfer.model.transducer import build_transducer
from icetransfer.streaming.exported import Exported

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


def fenced(folder, language):
    (found,) = re.findall(rf"```{language}\n(.*?)```", (folder / "README.md").read_text(), re.S)
    return found


def test_the_python_lines_print_what_the_readme_says(folder) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, fenced(folder, "python")],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = re.search(r"\| int8 \| `(.*)` \|", (folder / "README.md").read_text())
    assert said is not None
    assert done.stdout.strip() == said[1].strip() != ""


def test_the_hook_refuses_what_is_not_theirs(folder) -> None:
    command = [sys.executable, "-I", "-c", ALONE, "import onnx"]
    assert "onnx is not installed" in subprocess.run(command, capture_output=True, text=True).stderr


def test_the_command_runs_as_written(folder) -> None:
    words = fenced(folder, "bash").replace("\\\n", " ").split()
    assert words[0] == (
        "sherpa-onnx" if "chunk" in (folder / "MODEL_CARD.md").read_text() else words[0]
    )
    for word in words[1:]:
        assert (folder / word.rpartition("=")[2]).is_file()
    program = shutil.which(words[0], path=str(Path(sys.executable).parent))
    assert program is not None
    done = subprocess.run(
        [program, *words[1:]], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert '"text": "' in done.stdout + done.stderr


def test_a_bundle_is_whole(folder, experiment) -> None:
    bundle = Exported(folder)
    for precision in ("fp32", "int8", "int4"):
        bundle.inspect(precision)
    samples, rate = soundfile.read(folder / "test.wav")
    assert rate == 16000 and 0.5 < len(samples) / rate < pack.LONGEST
    assert np.abs(samples).max() > 0.1
    assert (folder / "test.txt").read_text().split()
    assert (folder / "bpe.model").read_bytes() == (experiment.lang_dir / "bpe.model").read_bytes()


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
