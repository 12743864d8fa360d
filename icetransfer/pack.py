"""Stage 11: one folder to hand over for each latency tier, with all that it takes to run it.

    python -m icetransfer.pack --exp DIR

exp/bundle/<tier>/ holds the models of every precision, tokens.txt, bpe.model, export.json, a test
recording with its transcript, a README.md with the lines that run it in sherpa-onnx, and a
MODEL_CARD.md: what it was made of, what it scored, and who must be named.  `bundle.tar=true` in the
config adds exp/bundle/<tier>.tar.
"""

import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import soundfile

from icetransfer.analysis.gap_report import markdown_table
from icetransfer.config import chunk_label
from icetransfer.data.features import read_manifest
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.data.utterances import SAMPLING_RATE
from icetransfer.decode import Reader
from icetransfer.experiment import Experiment, log, run_stage
from icetransfer.model_card import bundle_card
from icetransfer.onnx.quantize import same_file
from icetransfer.score import test_sets
from icetransfer.stage import atomic
from icetransfer.streaming.exported import Exported
from icetransfer.streaming.sherpa import SherpaRecognizer
from icetransfer.streaming.streams import tail_seconds

LONGEST = 12.0  # seconds of the test recording

PYTHON = {
    True: """\
import numpy, sherpa_onnx, soundfile

recognizer = sherpa_onnx.OnlineRecognizer.from_transducer(
    tokens="tokens.txt",
    encoder="{encoder}",
    decoder="{decoder}",
    joiner="{joiner}",
)
samples, rate = soundfile.read("test.wav", dtype="float32")
stream = recognizer.create_stream()
stream.accept_waveform(rate, samples)
silence = numpy.zeros(int({tail:.2f} * rate), dtype="float32")  # lets the last word out
stream.accept_waveform(rate, silence)
stream.input_finished()
while recognizer.is_ready(stream):
    recognizer.decode_stream(stream)
print(recognizer.get_result(stream))
""",
    False: """\
import numpy, sherpa_onnx, soundfile

recognizer = sherpa_onnx.OfflineRecognizer.from_transducer(
    tokens="tokens.txt",
    encoder="{encoder}",
    decoder="{decoder}",
    joiner="{joiner}",
)
samples, rate = soundfile.read("test.wav", dtype="float32")
samples = numpy.concatenate([samples, numpy.zeros(int({tail:.2f} * rate), dtype="float32")])
stream = recognizer.create_stream()
stream.accept_waveform(rate, samples)
recognizer.decode_stream(stream)
print(stream.result.text)
""",
}

README = """\
# {language}, {latency}

A Zipformer transducer for sherpa-onnx; what it was made of and how well it does is in
[MODEL_CARD.md](MODEL_CARD.md). It comes in {precisions}; the lines below take {shown}, and only
the names of files differ for another.

In Python, after `pip install sherpa-onnx soundfile`, from inside this folder:

```python
{python}```

With sherpa-onnx's program, which `pip install sherpa-onnx-bin` brings:

```bash
{command}
```
{aside}
`test.wav` says, by its transcript in `test.txt`: {transcript}
The Python lines print, by precision:

{heard}

`export.json` holds the size and SHA-256 of every model file and of tokens.txt; icetransfer's tools
check them before they load anything.
"""


# Seen in 2.0.1, by feeding the library with what gives the program's tokens and times.
ASIDE = """
It puts half a second of silence before a recording by itself; a model of whose training data
nothing began so may answer otherwise than through Python.
"""


class Sample(NamedTuple):
    """The recording that goes with a bundle."""

    id: str
    samples: Any  # float32, 16 kHz
    text: str


def pack_tiers(experiment: Experiment) -> None:
    """Makes the folder of every tier.

    Raises:
        ValueError: something that an earlier stage makes is missing.
    """
    sample = find_sample(experiment)
    for size in experiment.config.decode.chunk_sizes:
        source = Exported(experiment.onnx_dir(size))
        folder = experiment.bundle_dir / source.dir.name
        pack_tier(experiment, source, size, sample, folder)
        if experiment.config.bundle.tar:
            with (
                atomic.atomic_path(folder.with_suffix(".tar")) as temporary,
                tarfile.open(temporary, "w") as archive,
            ):
                archive.add(folder, folder.name)
        log.info("-> %s", folder)
    log.info("the README.md in each says how to run it")


def find_sample(experiment: Experiment) -> Sample:
    """The longest recording of the first test set that is no longer than `LONGEST`.

    Raises:
        ValueError: none can be read.
    """
    (_, (manifest, _)), *_ = test_sets(experiment.config).items()
    path = experiment.manifests_dir / manifest
    cuts = {cut.id: cut for cut in read_manifest(path) if cut.duration <= LONGEST}
    longest_first = sorted(cuts.values(), key=lambda cut: (-cut.duration, cut.id))
    for key, samples in Reader(longest_first):
        supervision = cuts[key].supervisions[0]
        return Sample(key, samples, (supervision.custom or {}).get("raw_text", supervision.text))
    raise ValueError(f"{path} has no readable recording of at most {LONGEST:g} s")


def pack_tier(
    experiment: Experiment, source: Exported, chunk_size: int, sample: Sample, folder: Path
) -> None:
    """Makes the folder of a tier anew; it is there whole or not at all.

    Args:
        experiment: what the bundle is of.
        source: the exported tier.
        chunk_size: in 50 Hz frames; -1 is offline.
        sample: what to put in for a try.
        folder: to make.

    Raises:
        ValueError: the tier was not exported, or its files are not as they were.
    """
    precisions = experiment.config.decode.precisions
    for precision in precisions:
        source.check(precision)
    made = folder.with_name(f".partial.{folder.name}")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    for path in {*source.files(precisions)}:
        same_file(path, made / path.name)
    shutil.copyfile(source.description, made / source.description.name)
    shutil.copyfile(experiment.lang_dir / "bpe.model", made / "bpe.model")
    soundfile.write(made / "test.wav", sample.samples, SAMPLING_RATE, subtype="PCM_16")
    (made / "test.txt").write_text(sample.text + "\n", encoding="utf-8")
    text = readme(Exported(made), experiment.config.language, chunk_size, precisions, sample)
    (made / "README.md").write_text(text, encoding="utf-8")
    text = bundle_card(experiment, source, chunk_size)
    (made / "MODEL_CARD.md").write_text(text, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    made.replace(folder)


def readme(
    bundle: Exported, language: str, chunk_size: int, precisions: Sequence[str], sample: Sample
) -> str:
    """README.md: the lines that run the bundle, and what they should print."""
    shown = "int8" if "int8" in precisions else precisions[0]
    names = {part: path.name for part, path in bundle.models(shown).items()}
    streaming = chunk_size != -1
    program = "sherpa-onnx" if streaming else "sherpa-onnx-offline"
    options = ["--tokens=tokens.txt", *(f"--{part}={name}" for part, name in names.items())]
    return README.format(
        language=language,
        latency=chunk_label(chunk_size),
        precisions=", ".join(precisions),
        shown=shown,
        python=PYTHON[streaming].format(**names, tail=tail_seconds(chunk_size)),
        command=" \\\n  ".join([program, *options, "test.wav"]),
        aside=ASIDE if streaming else "",
        transcript=f"`{sample.text}`",
        heard=recognised(bundle, chunk_size, precisions, sample),
    )


def recognised(bundle: Exported, chunk_size: int, precisions: Sequence[str], sample: Sample) -> str:
    """A table of what each precision makes of the sample in sherpa-onnx, which must load it."""
    tokenizer = Tokenizer(bundle.dir / "bpe.model")
    tail = tail_seconds(chunk_size)
    rows = []
    for precision in precisions:
        recognizer = SherpaRecognizer(bundle.dir, chunk_size, precision, tail_seconds=tail)
        (found,) = recognizer([sample.samples])
        rows.append([precision, f"`{tokenizer.decode(found.tokens)}`"])
    return markdown_table(["precision", "text"], rows).rstrip()


if __name__ == "__main__":
    run_stage(__doc__, pack_tiers)
