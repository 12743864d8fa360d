"""Stage 11: one folder to hand over for each latency tier, with all that it takes to run it.

    python -m icetransfer.pack --exp DIR

exp/bundle/<tier>/ holds the models of every precision, tokens.txt, bpe.model, export.json, a test
recording with its transcript, a README.md with the lines that run it in sherpa-onnx, and a
MODEL_CARD.md: what it was made of, what it scored, and who must be named.  `bundle.tar=true` in the
config adds exp/bundle/<tier>.tar.
"""

import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import soundfile

from icetransfer import atomic
from icetransfer.bundle import Bundle
from icetransfer.config import SyntheticCorpus, chunk_label, hours_label
from icetransfer.data.features import SAMPLING_RATE, read_manifest
from icetransfer.data.published import PUBLISHED
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.decode import Reader, tail_seconds
from icetransfer.experiment import Experiment, log, provenance, run_stage
from icetransfer.gap_report import markdown_table
from icetransfer.quantize import same_file
from icetransfer.score import planned_runs, test_sets
from icetransfer.sherpa import SherpaRecognizer

LONGEST = 12.0  # seconds of the test recording
RESULT: dict[str, Callable[[dict[str, Any]], str]] = {  # columns of the model card
    "test set": lambda r: r["test_set"],
    "engine": lambda r: r["engine"],
    "precision": lambda r: r["precision"],
    "WER %": lambda r: f"{r['wer']:.2f}",
    "CER %": lambda r: f"{r['cer']:.2f}",
    "deletions": lambda r: str(r["deletions"]),
    "insertions": lambda r: str(r["insertions"]),
    "words": lambda r: str(r["words"]),
    "MB": lambda r: f"{r['model_bytes'] / 1e6:.2f}",
}

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
[MODEL_CARD.md](MODEL_CARD.md). Precisions: {precisions}. Those of another precision than the one
below differ in the names of their files alone.

In Python, after `pip install sherpa-onnx soundfile`, from inside this folder:

```python
{python}```

With sherpa-onnx's program, where it is installed:

```bash
{command}
```

`test.wav` says, by its transcript in `test.txt`: {transcript}
The Python lines print, by precision:

{heard}

`export.json` holds the size and SHA-256 of every model file and of tokens.txt; icetransfer's tools
check them before they load anything.
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
        source = Bundle(experiment.onnx_dir(size))
        folder = experiment.bundle_dir / source.dir.name
        pack_tier(experiment, source, size, sample, folder)
        if experiment.config.bundle.tar:
            with (
                atomic.atomic_path(folder.with_suffix(".tar")) as temporary,
                tarfile.open(temporary, "w") as archive,
            ):
                archive.add(folder, folder.name)
        log.info("-> %s", folder)


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
    experiment: Experiment, source: Bundle, chunk_size: int, sample: Sample, folder: Path
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
    results = read_results(experiment, chunk_size)
    text = readme(Bundle(made), experiment.config.language, chunk_size, precisions, sample)
    (made / "README.md").write_text(text, encoding="utf-8")
    text = card(experiment, source, chunk_size, results)
    (made / "MODEL_CARD.md").write_text(text, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    made.replace(folder)


def read_results(experiment: Experiment, chunk_size: int) -> list[dict[str, Any]]:
    """The wer.json of a tier's runs that are there."""
    runs = (run for run in planned_runs(experiment.config) if run.chunk_size == chunk_size)
    paths = [run.folder(experiment.decode_dir) / "wer.json" for run in runs]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def readme(
    bundle: Bundle, language: str, chunk_size: int, precisions: Sequence[str], sample: Sample
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
        python=PYTHON[streaming].format(**names, tail=tail_seconds(chunk_size)),
        command=" \\\n  ".join([program, *options, "test.wav"]),
        transcript=f"`{sample.text}`",
        heard=recognised(bundle, chunk_size, precisions, sample),
    )


def recognised(bundle: Bundle, chunk_size: int, precisions: Sequence[str], sample: Sample) -> str:
    """A table of what each precision makes of the sample in sherpa-onnx, which must load it."""
    tokenizer = Tokenizer(bundle.dir / "bpe.model")
    tail = tail_seconds(chunk_size)
    rows = []
    for precision in precisions:
        recognizer = SherpaRecognizer(bundle.dir, chunk_size, precision, tail_seconds=tail)
        (found,) = recognizer([sample.samples])
        rows.append([precision, f"`{tokenizer.decode(found.tokens)}`"])
    return markdown_table(["precision", "text"], rows).rstrip()


def card(
    experiment: Experiment, source: Bundle, chunk_size: int, results: list[dict[str, Any]]
) -> str:
    """MODEL_CARD.md: base model, data, errors by precision, licences, provenance."""
    config = experiment.config
    exported = json.loads(source.description.read_text(encoding="utf-8"))
    start = _read(experiment.dir / "transfer.json").get("base_model") or {}
    subset = _read(experiment.manifests_dir / f"subset-{hours_label(config.hours)}.json")
    facts = {
        "language": config.language,
        "latency": chunk_label(chunk_size),
        "left context": "all"
        if chunk_size == -1
        else f"{config.decode.left_context_frames} frames",
        "base model": start.get("name", config.init),
        "base model's sha256": f"`{start['sha256']}`" if "sha256" in start else "",
        "fine-tuned on": ", ".join(
            f"{name}: {found['hours']:.4g} h, {found['speakers']} speakers"
            for name, found in subset.get("corpora", {}).items()
        ),
        "training": f"{config.train.max_steps} steps, seed {config.seed}",
        "search": config.decode.search,
        "checkpoint's sha256": f"`{exported['made_of']['sha256']}`",
        "commit of the export": f"`{exported['provenance']['git_commit']}`",
        "versions": ", ".join(
            f"{name} {version}" for name, version in provenance()["versions"].items()
        ),
    }
    made = [
        [
            precision,
            f"{size / 1e6:.2f}",
            f"{exported['bytes']['fp32'] / size:.2f}",
            _how(source, precision),
        ]
        for precision, size in exported["bytes"].items()
    ]
    rows = [[column(result) for column in RESULT.values()] for result in results]
    table = markdown_table([*RESULT], rows).rstrip() if rows else "not decoded: run stage 9"
    return (
        "\n\n".join(
            [
                f"# Model card: {config.language}, {chunk_label(chunk_size)}",
                markdown_table(["", ""], [[k, v] for k, v in facts.items() if v]).rstrip(),
                "## Errors",
                table,
                "## Files",
                markdown_table(["precision", "MB", "times smaller", "made with"], made).rstrip(),
                "## Licences",
                "\n".join(f"* {line}" for line in licences(experiment, start)),
            ]
        )
        + "\n"
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _how(source: Bundle, precision: str) -> str:
    settings = source.quantisation(precision)
    kept = settings.pop("kept", [])
    said = [f"{key} {value}" for key, value in settings.items()]
    return ", ".join(
        [*said, *([f"{len(kept)} layers kept higher: {' '.join(kept)}"] if kept else [])]
    )


def licences(experiment: Experiment, base_model: dict[str, Any]) -> list[str]:
    """A line for the base model and for each corpus."""
    lines = []
    if base_model:
        lines.append(f"base model {base_model['name']}: {base_model.get('licence', 'not known')}")
    for name, corpus in experiment.config.data.corpora.items():
        if corpus.kind in PUBLISHED:
            published = PUBLISHED[corpus.kind]
            lines.append(f"{published.title} ({name}): {published.licence}")
        elif isinstance(corpus, SyntheticCorpus):
            lines.append(
                f"{name}: made by espeak-ng (GPL-3.0), which is not part of the model; test.wav is "
                "its output"
            )
        else:
            lines.append(f"{name}: your own recordings; test.wav is one of them")
    return lines


if __name__ == "__main__":
    run_stage(__doc__, pack_tiers)
