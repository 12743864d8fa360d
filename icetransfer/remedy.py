"""Finds the layers to keep in higher precision where int8 or int4 costs too much.

    python -m icetransfer.remedy --exp DIR

For every tier and each of int8 and int4 among decode.precisions: where its WER on the dev set is
above fp32's by more than the margin (`remedy` in the config), each layer of the encoder is
quantised alone and the change of the encoder's outputs on dev recordings taken as its sensitivity.
The most sensitive layers are then kept out of the precision, 1, 2, 4, ... of them, until the margin
holds: in fp32 for int8, in what `export.int4.rest` says for int4.  What was found is written to
remedy.json; every later export follows it, and one is made at the end.

A layer here is a part of one of the Zipformer's layers, such as
encoder.encoders.0.layers.0.feed_forward1, with all its products and convolutions.
"""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
import torch
from lhotse.cut import Cut
from onnx import ModelProto
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from icetransfer import score
from icetransfer.config import Export, chunk_label
from icetransfer.data.features import PADDING, fbank, read_manifest
from icetransfer.data.text.normalizer import Normalizer
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.decode import (
    OFFLINE_BATCH_SECONDS,
    Reader,
    batches,
    make_rows,
)
from icetransfer.experiment import Experiment, log, provenance, run_stage
from icetransfer.export import export_tiers
from icetransfer.model.subsampling import WINDOW_EXTRA
from icetransfer.onnx.quantize import layer_names, quantize_encoder, same_file
from icetransfer.stage import atomic
from icetransfer.stage.progress import progress_bar
from icetransfer.stage.stamp import sha256
from icetransfer.streaming.exported import PARTS, Exported
from icetransfer.streaming.onnx_model import OnnxTransducer
from icetransfer.streaming.search import Hypothesis
from icetransfer.streaming.sherpa import SherpaRecognizer
from icetransfer.streaming.streams import tail_seconds

PROBES = 16  # recordings on which sensitivities are taken
PROBE_FRAMES = 400  # of each, at most

_GROUP = re.compile(r"(.*\.layers\.\d+\.\w+|\w+\.\w+)")


@dataclass
class Trial:
    """A number of layers kept, and what that gave."""

    layers: int
    wer: float
    encoder_bytes: int


@dataclass
class Finding:
    """What is known of one precision at one tier; `kept` are names of products."""

    tier: str
    precision: str
    margin: float
    words: int
    wer_fp32: float
    trials: list[Trial]  # the first is of no layers
    sensitivities: dict[str, float]
    layers: int  # of the trial that is kept to
    kept: list[str]
    holds: bool  # whether the margin does


def groups(names: list[str]) -> dict[str, list[str]]:
    """The products and convolutions of each layer."""
    found = defaultdict(list)
    for name in names:
        match = _GROUP.match(name)
        found[match[1] if match else name].append(name)
    return dict(found)


def sensitivities(
    encoder: ModelProto,
    precision: str,
    settings: Export,
    outputs: Callable[[ModelProto], Tensor],
) -> dict[str, float]:
    """How much each layer, quantised alone, changes what the encoder puts out.

    Args:
        encoder: in fp32.
        precision: "int8" or "int4".
        settings: how; layers that are not in question stay fp32.
        outputs: of an encoder, for the same input every time.

    Returns:
        The norm of the change relative to the outputs' own, by layer, largest first.
    """
    alone = settings.model_copy(
        update={"int4": settings.int4.model_copy(update={"rest": "fp32"})}, deep=True
    )
    full = outputs(encoder)
    found: dict[str, float] = {}
    layers = groups(layer_names(encoder.graph))
    with progress_bar() as progress:
        for layer, names in progress.track(layers.items(), description=f"{precision}, each layer"):
            changed = outputs(quantize_encoder(encoder, precision, alone, {*names}))
            found[layer] = float((changed - full).norm() / full.norm())
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def keep_layers(
    first: Trial, order: list[str], measure: Callable[[int], Trial], bound: float
) -> list[Trial]:
    """Keeps ever more of the most sensitive layers until WER is at most `bound`.

    Args:
        first: the trial of no layers kept.
        order: layers, most sensitive first.
        measure: the trial of a number of the first of them.
        bound: in percent.

    Returns:
        The trials, the last of which holds or is of all layers.
    """
    trials = [first]
    while trials[-1].wer > bound and trials[-1].layers < len(order):
        count = min(max(1, 2 * trials[-1].layers), len(order))
        trials.append(measure(count))
    return trials


class Dev:
    """The dev set of an experiment, recognised by variants of its tiers.

    Args:
        experiment: whose models these are.

    Raises:
        ValueError: there is no dev set.
    """

    def __init__(self, experiment: Experiment) -> None:
        decode = experiment.config.decode.model_copy(update={"splits": ("dev",)})
        sets = score.test_sets(experiment.config.model_copy(update={"decode": decode}))
        self._sets: list[tuple[list[Cut], Normalizer]] = [
            (read_manifest(experiment.manifests_dir / manifest), Normalizer(language))
            for manifest, language in sets.values()
        ]
        if not any(cuts for cuts, _ in self._sets):
            raise ValueError(f"{experiment.manifests_dir} has no dev set to measure WER on")
        self._decode = experiment.config.decode
        self._tokenizer = Tokenizer(experiment.lang_dir / "bpe.model")

    def errors(self, exported: Exported, chunk_size: int, precision: str) -> score.Counts:
        """Word errors of sherpa-onnx over all dev sets."""
        recognizer = SherpaRecognizer(
            exported.dir,
            chunk_size,
            precision,
            self._decode.search,
            self._decode.beam,
            tail_seconds(chunk_size),
        )
        seconds = OFFLINE_BATCH_SECONDS if chunk_size == -1 else float("inf")
        rows = []
        for cuts, normalize in self._sets:
            reader = Reader(sorted(cuts, key=lambda cut: (cut.duration, cut.id)))
            found: dict[str, Hypothesis] = {}
            for keys, group in batches(iter(reader), self._decode.batch_streams, seconds):
                found.update(zip(keys, recognizer(group), strict=True))
            rows += make_rows(cuts, found, reader.problems, self._tokenizer, normalize)
        return score.word_errors(rows)

    def probes(self) -> Tensor:
        """Features (N, T, 80) of the beginnings of some recordings."""
        cuts = [cut for cuts, _ in self._sets for cut in cuts]
        spread = cuts[:: max(1, len(cuts) // PROBES)][:PROBES]
        features = [
            torch.from_numpy(fbank(samples))[:PROBE_FRAMES] for _, samples in Reader(spread)
        ]
        return pad_sequence(features, batch_first=True, padding_value=PADDING)


def encoder_outputs(folder: Path, features: Tensor) -> Tensor:
    """What an export's encoder makes of features (N, T, 80): (N, T4, J)."""
    model = OnnxTransducer(folder)
    streams, frames, _ = features.shape
    if model.chunk_size == -1:
        return model.encode(features, torch.full((streams,), frames))[0]
    window, step = 2 * model.chunk_size + WINDOW_EXTRA, 2 * model.chunk_size
    state = model.initial_state(streams, model.chunk_size, model.left_context_frames)
    outs = []
    for begin in range(0, max(1, frames - window + 1), step):
        piece = features[:, begin : begin + window]
        short = window - piece.size(1)
        piece = torch.nn.functional.pad(piece, (0, 0, 0, short), value=PADDING)
        out, state = model.encode_chunk(piece.contiguous(), state)
        outs.append(out)
    return torch.cat(outs, 1)


def examine(
    experiment: Experiment, dev: Dev, chunk_size: int, precision: str, folder: Path
) -> Finding:
    """One precision at one tier: its cost, and the layers to keep where that is too much.

    Args:
        experiment: whose models these are.
        dev: its dev set.
        chunk_size: of the tier.
        precision: "int8" or "int4".
        folder: for variants of the encoder.
    """
    source, settings = Exported(experiment.onnx_dir(chunk_size)), experiment.config.export
    encoder = onnx.load(str(source.model("encoder", "fp32")))
    layers = groups(layer_names(encoder.graph))
    everything = {name for names in layers.values() for name in names}
    variant = Exported(folder)

    def install(model: ModelProto, heads: str) -> Exported:
        for part in PARTS[1:]:
            same_file(source.model(part, heads), variant.model(part, "fp32"))
        same_file(source.tokens, variant.tokens)
        onnx.save(model, str(variant.model("encoder", "fp32")))
        return variant

    found: dict[str, float] = {}

    def first_products(count: int) -> set[str]:
        return {name for layer in [*found][:count] for name in layers[layer]}

    def measure(count: int) -> Trial:
        chosen = everything - first_products(count)
        made = quantize_encoder(encoder, precision, settings, chosen)
        errors = dev.errors(install(made, precision), chunk_size, "fp32")
        return Trial(count, errors.rate, variant.model("encoder", "fp32").stat().st_size)

    full = dev.errors(source, chunk_size, "fp32")
    margin = getattr(experiment.config.remedy, precision)
    bound = full.rate + margin
    trials = [measure(0)]
    if trials[0].wer > bound:
        features = dev.probes()
        found = sensitivities(
            encoder,
            precision,
            settings,
            lambda model: encoder_outputs(install(model, "fp32").dir, features),
        )
        trials = keep_layers(trials[0], [*found], measure, bound)
    best = min(trials, key=lambda trial: (max(trial.wer, bound), trial.layers))
    return Finding(
        tier=source.dir.name,
        precision=precision,
        margin=margin,
        words=full.length,
        wer_fp32=full.rate,
        trials=trials,
        sensitivities=found,
        layers=best.layers,
        kept=sorted(first_products(best.layers)),
        holds=best.wer <= bound,
    )


def remedy(experiment: Experiment) -> None:
    """Examines every tier and precision, writes remedy.json and exports anew.

    Raises:
        ValueError: something that an earlier stage makes is missing.
    """
    torch.set_num_threads(1)
    wanted = [p for p in experiment.config.decode.precisions if p in ("int8", "int4")]
    if not wanted:
        raise ValueError("neither int8 nor int4 is in decode.precisions: there is nothing to do")
    export_tiers(experiment)
    dev = Dev(experiment)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in experiment.config.decode.chunk_sizes:
            for precision in wanted:
                found = examine(experiment, dev, size, precision, Path(folder))
                for line in describe(found, chunk_label(size)):
                    log.info("%s", line)
                rows.append(asdict(found))
    written = {
        "checkpoint_sha256": sha256(experiment.averaged_checkpoint),
        "rows": rows,
        "provenance": provenance(),
    }
    atomic.write_text(experiment.remedy_file, json.dumps(written, indent=2) + "\n")
    log.info("-> %s", experiment.remedy_file)
    export_tiers(experiment)
    log.info("run stages 9 to 11 again: they take up what has changed")


def describe(found: Finding, latency: str) -> Iterator[str]:
    """Lines for people: the cost, and what keeping layers did to it."""
    where = f"{found.precision} at {latency}"
    cost = found.trials[0].wer - found.wer_fp32
    yield (
        f"{where}: {cost:+.2f} WER points on dev ({found.words} words; fp32 {found.wer_fp32:.2f} "
        f"%), margin {found.margin:g}"
    )
    for trial in found.trials[1:]:
        yield (
            f"  {trial.layers} layers kept: {trial.wer - found.wer_fp32:+.2f}, encoder "
            f"{trial.encoder_bytes / 1e6:.2f} MB"
        )
    if not found.holds:
        yield f"  {where}: the margin is not reached; the best of these is kept to"


if __name__ == "__main__":
    run_stage(__doc__, remedy)
