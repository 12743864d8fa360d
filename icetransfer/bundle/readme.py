"""README.md of a bundle: the lines that run it as it lies, with sherpa-onnx alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from icetransfer.bundle.check import command, models
from icetransfer.bundle.settings import Settings
from icetransfer.config import chunk_label
from icetransfer.stage.markdown import markdown_table
from icetransfer.streaming.hotwords import SCORE

ONLINE = """\
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
silence = numpy.zeros(int({tail:g} * rate), dtype="float32")  # lets the last word out
stream.accept_waveform(rate, silence)
stream.input_finished()
while recognizer.is_ready(stream):
    recognizer.decode_stream(stream)
print(recognizer.get_result(stream))
"""

OFFLINE = """\
import numpy, sherpa_onnx, soundfile

recognizer = sherpa_onnx.OfflineRecognizer.from_transducer(
    tokens="tokens.txt",
    encoder="{encoder}",
    decoder="{decoder}",
    joiner="{joiner}",
)
samples, rate = soundfile.read("test.wav", dtype="float32")
samples = numpy.concatenate([samples, numpy.zeros(int({tail:g} * rate), dtype="float32")])
stream = recognizer.create_stream()
stream.accept_waveform(rate, samples)
recognizer.decode_stream(stream)
print(stream.result.text)
"""

README = """\
# {language}, {latency}

A Zipformer transducer for sherpa-onnx; what it was made of and how well it does is in
[MODEL_CARD.md](MODEL_CARD.md). It comes in {precisions}; the lines below take {shown}, and only
the names of files differ for another.

Is it whole, and does it do here what it did where it was packed? This needs sherpa-onnx and numpy:

    python check.py

In Python, after `pip install sherpa-onnx soundfile`, from inside this folder:

```python
{python}```

With sherpa-onnx's program, which `pip install sherpa-onnx-bin` brings:

```bash
{command}
```

`test.wav` says, by its transcript in `test.txt`: {transcript}
{prints}, by precision:

{heard}

{more}## Files

`bundle.json` holds the arguments above and the reasons for them, `SHA256SUMS` the checksum of every
file (`sha256sum -c SHA256SUMS`). `export.json` says how the models were made; icetransfer's tools
compare the models with it before they load them.{weights}
"""

WEIGHTS = """ The weights of an encoder lie in the file
`encoder*.weights` beside it and must stay there. Tiers that were packed together share it: it is
one file with several names (hard links), which `tar`, `cp -a` and `rsync -aH` keep as one."""

PRINT_OFFLINE = """\
The program puts no silence after a recording, and may lose the end of its last word. The Python
lines print"""

LIVE = """\
## Speech without end

An utterance ends where an endpoint is found. {measured}

{rules}

The same options go to `sherpa-onnx`, `sherpa-onnx-microphone` and
`sherpa-onnx-online-websocket-server`, and without the dashes to `from_transducer`:

```bash
{server}
```

```bash
sherpa-onnx-online-websocket-client --server-port=6006 test.wav
```

On noise and music the model may say words that it hardly believes in. `get_result_all` gives the
logarithm of each token's probability (`ys_probs`); leave out segments in which the exponential of
their mean is below {least:g}, as `python -m icetransfer.transcribe` does.

"""

LONG = """\
## Long recordings

This tier hears a recording as a whole, and its memory grows with the square of the length: cut
what is longer than half a minute at pauses. `python -m icetransfer.transcribe --bundle DIR FILE`
does so.

"""

HOTWORDS = """\
## Words to expect

Names and terms, a phrase a line in `hotwords.txt`, spelt as the model spells, are made likelier:

```bash
{command}
```

A line may end with a score of its own, as in `scheveningen :2`. The higher, the more of these
words are found, and the more are heard that nobody said. The scores in `bpe.vocab` were chosen for
sherpa-onnx to cut words into tokens as the model does.

"""


def _expect(bundle: Mapping[str, Any]) -> list[str]:
    """The options that make sherpa-onnx's program expect hotwords."""
    more = (f"--{key.replace('_', '-')}={value}" for key, value in bundle["sherpa_onnx"].items())
    file = ("--hotwords-file=hotwords.txt", f"--hotwords-score={SCORE:g}")
    return ["--decoding-method=modified_beam_search", *more, *file]


def readme(
    bundle: Mapping[str, Any],
    settings: Settings,
    language: str,
    transcript: str,
    results: Sequence[Mapping[str, Any]],
    shared: bool = False,
) -> str:
    """The text.

    Args:
        bundle: what bundle.json says.
        settings: the rules of endpoints.
        language: of the model.
        transcript: of test.wav.
        results: the wer.json of the tier.
        shared: whether weights lie in a file of their own.
    """
    size, precisions, tail = bundle["chunk_size"], bundle["precisions"], bundle["tail"]
    shown = "int8" if "int8" in precisions else precisions[0]
    names = models(shown)
    program = "sherpa-onnx-offline" if size == -1 else "sherpa-onnx"
    *options, recording = command(dict(bundle), shown)
    more = LONG if size == -1 else _live(settings, names)
    return README.format(
        language=language,
        latency=chunk_label(size),
        precisions=", ".join(precisions),
        shown=shown,
        python=(OFFLINE if size == -1 else ONLINE).format(**names, tail=tail),
        command=_lines(program, *options, recording),
        transcript=f"`{transcript}`",
        prints=PRINT_OFFLINE if size == -1 else "Both print",
        heard=_heard(bundle, results),
        more=more + HOTWORDS.format(command=_lines(program, *options, *_expect(bundle), recording)),
        weights=WEIGHTS if shared else "",
    )


def _lines(*words: str) -> str:
    """A command, a word a line."""
    return " \\\n  ".join(words)


def _heard(bundle: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """A row for each precision: its size, its WER on every test set, what it makes of test.wav."""
    found = {
        (row["test_set"], row["precision"]): row for row in results if row["engine"] != "torch"
    }
    sets = sorted({name for name, _ in found})
    rows = []
    for precision in bundle["precisions"]:
        errors = [found.get((name, precision)) for name in sets]
        cells = [f"{row['wer']:.2f}" if row else "" for row in errors]
        size = f"{bundle['bytes'][precision] / 1e6:.2f}"
        text = bundle["test"][precision].replace("|", "\\|")
        rows.append([precision, size, *cells, f"`{text}`"])
    header = ["precision", "MB", *(f"WER %, {name}" for name in sets), "text"]
    return markdown_table(header, rows).rstrip()


def _live(settings: Settings, names: Mapping[str, str]) -> str:
    rules = [
        [f"`--{key.replace('_', '-')}`", f"{value:g} s", settings.reasons.get(key[:5], "")]
        for key, value in settings.rules.items()
    ]
    files = [f"--{key}={name}" for key, name in names.items()]
    options = [f"--{key.replace('_', '-')}={value:g}" for key, value in settings.rules.items()]
    server = ("sherpa-onnx-online-websocket-server", "--port=6006", *files)
    return LIVE.format(
        rules=markdown_table(["option", "value", "reason"], rules).rstrip(),
        measured=_measured(settings.reasons),
        server=_lines(*server, "--enable-endpoint=true", *options),
        least=settings.min_confidence,
    )


def _measured(reasons: Mapping[str, Any]) -> str:
    """Where the rules come from, and what they did to the dev set."""
    if "default" in reasons:
        return f"The rules are {reasons['default']}:"
    if not (measured := reasons["measured"]):
        return "The rules found no endpoint in the dev set: the model does not fall silent."
    return (
        f"The rules were chosen for this model on {reasons['utterances']} utterances of its dev "
        f"set.\nOf these they end {100 * measured['cut_inside']:.2g} % too early, and the endpoint "
        f"comes {measured['delay_median']:g} s after the last token\n(median; "
        f"{measured['delay_p95']:g} s at 95 %), counted in audio that the model has heard:"
    )
