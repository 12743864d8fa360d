"""Stage 11: one folder to hand over for each latency tier, with all that it takes to run it.

    python -m icetransfer.pack --exp DIR
    python -m icetransfer.pack --check exp/bundle/<tier>    does it do here what it did there?
    python -m icetransfer.pack --exp DIR --push ORG/NAME    uploads every tier to a model hub

exp/bundle/<tier>/ holds the models of every precision, tokens.txt, bpe.model and bpe.vocab,
export.json, a test recording with its transcript, a README.md with the lines that run it in
sherpa-onnx, and a MODEL_CARD.md: what it was made of, what it scored, and who must be named.
bundle.json has the rules of endpoints, chosen from the dev set, SHA256SUMS every file's checksum;
check.py checks the bundle where there is only sherpa-onnx and numpy.  `bundle.tar=true` in the
config adds exp/bundle/<tier>.tar.

--push needs `hf auth login` or HF_TOKEN.  It makes a private repository where there is none, and
puts a folder for each tier into it, with a README.md that lists them, in one commit; `--dry-run`
says what it would upload.
"""

import json
import shutil
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import soundfile

import icetransfer
from icetransfer.bundle import check, endpoint
from icetransfer.bundle.readme import readme
from icetransfer.bundle.settings import (
    LANGUAGE_MODEL,
    Settings,
    read_settings,
    write_settings,
)
from icetransfer.bundle.vocabulary import vocabulary
from icetransfer.config import chunk_label, chunk_ms
from icetransfer.data.features import read_manifest
from icetransfer.data.subset import training_texts
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.data.utterances import SAMPLING_RATE
from icetransfer.decode import Reader, decode_offline, decode_streams
from icetransfer.experiment import (
    Experiment,
    enter_recipe,
    log,
    main,
    open_experiment,
    run_logged,
    stage_parser,
)
from icetransfer.model import hub
from icetransfer.model_card import bundle_card, hub_card, read_results
from icetransfer.onnx.quantize import same_file
from icetransfer.onnx.share import bytes_on_disk, share_weights
from icetransfer.score import test_sets
from icetransfer.stage import atomic
from icetransfer.stage.json_file import read_json
from icetransfer.stage.stamp import Stamp, digests, sha256
from icetransfer.streaming.exported import Exported, file_facts
from icetransfer.streaming.onnx_model import OnnxTransducer
from icetransfer.streaming.search import SHERPA, make_search
from icetransfer.streaming.sherpa import SherpaRecognizer
from icetransfer.streaming.streams import tail_seconds

LONGEST = 12.0  # seconds of the test recording
DEV_UTTERANCES = 400  # at most, from which the rules of endpoints are chosen


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
    sources = {s: Exported(experiment.onnx_dir(s)) for s in experiment.config.decode.chunk_sizes}
    shared = share_tiers(experiment, [*sources.values()])
    for size, source in sources.items():
        folder = experiment.bundle_dir / source.dir.name
        pack_tier(experiment, source, size, sample, folder, shared / source.dir.name)
        if experiment.config.bundle.tar:
            with (
                atomic.atomic_path(folder.with_suffix(".tar")) as temporary,
                tarfile.open(temporary, "w") as archive,
            ):
                archive.add(folder, folder.name)
        log.info("-> %s", folder)
    shutil.rmtree(shared, ignore_errors=True)
    size = main_tier(experiment.config.decode.chunk_sizes)
    for result in read_results(experiment, size):
        if result["precision"] == experiment.config.decode.precisions[0]:
            unit = "CER" if result.get("unit") == "character" else "WER"
            log.info(
                "%s %.1f %% (%s, %s, %s)", unit, result["wer"], result["test_set"],
                result["engine"], chunk_label(size),
            )  # fmt: skip
    latency = "offline" if size == -1 else chunk_ms(size)
    log.info(
        "next: python -m icetransfer.transcribe --bundle %s --latency %s FILE...",
        experiment.bundle_dir, latency,
    )  # fmt: skip


def main_tier(chunk_sizes: Sequence[int]) -> int:
    """The tier that is spoken of where there is room for one: the nearest to 320 ms."""
    return min(chunk_sizes, key=lambda size: (size == -1, abs(size - 16)))


def share_tiers(experiment: Experiment, sources: Sequence[Exported]) -> Path:
    """Makes encoders of the tiers that have their weights in one file, where that is smaller.

    Returns:
        A folder with a folder for each tier, which holds the files that take the place of those
        that were exported, or nothing.

    Raises:
        ValueError: a tier was not exported, or its files are not as they were.
    """
    folder = experiment.bundle_dir / ".partial.shared"
    shutil.rmtree(folder, ignore_errors=True)
    tiers = {source: Exported(folder / source.dir.name) for source in sources}
    for precision in experiment.config.decode.precisions:
        for source in sources:
            source.check(precision)
        if len(tiers) > 1 and share_weights(tiers, precision):
            encoders = [source.model("encoder", precision) for source in tiers]
            files = [t.model("encoder", precision) for t in tiers.values()]
            files += [t.weights(precision) for t in tiers.values()]
            sizes = (bytes_on_disk(encoders) / 1e6, bytes_on_disk(files) / 1e6)
            log.info(
                "%s: encoders of all tiers %.1f MB, with shared weights %.1f MB", precision, *sizes
            )
    return folder


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
    experiment: Experiment,
    source: Exported,
    chunk_size: int,
    sample: Sample,
    folder: Path,
    shared: Path | None = None,
) -> None:
    """Makes the folder of a tier anew; it is there whole or not at all.

    Args:
        experiment: what the bundle is of.
        source: the exported tier.
        chunk_size: in 50 Hz frames; -1 is offline.
        sample: what to put in for a try.
        folder: to make.
        shared: a folder with files that take the place of those that were exported.

    Raises:
        ValueError: the tier was not exported, or its files are not as they were.
    """
    precisions = experiment.config.decode.precisions
    for precision in precisions:
        source.check(precision)
    made = folder.with_name(f".partial.{folder.name}")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    for path in [*source.files(precisions), *(shared.glob("*") if shared else ())]:
        same_file(path, made / path.name)
    _describe(source, Exported(made), precisions)
    shutil.copyfile(experiment.lang_dir / "bpe.model", made / "bpe.model")
    soundfile.write(made / "test.wav", sample.samples, SAMPLING_RATE, subtype="PCM_16")
    (made / "test.txt").write_text(sample.text + "\n", encoding="utf-8")
    shutil.copyfile(check.__file__, made / "check.py")
    tokenizer = Tokenizer(experiment.lang_dir / "bpe.model")
    text = vocabulary(tokenizer, training_texts(experiment))
    (made / "bpe.vocab").write_text(text, encoding="utf-8")
    settings = choose_settings(experiment, source, chunk_size)
    facts = {
        "language": experiment.config.language,
        "chunk_size": chunk_size,
        "precisions": [*precisions],
        "bytes": {precision: Exported(made).size(precision) for precision in precisions},
        "tail": round(tail_seconds(chunk_size), 2),
        "sherpa_onnx": {
            "modeling_unit": "cjkchar" if tokenizer.is_of_characters else "bpe",
            "bpe_vocab": "bpe.vocab",
            **add_language_model(experiment, chunk_size, made),
        },
    }
    facts["test"] = {precision: check.by_python(made, facts, precision) for precision in precisions}
    write_settings(made, settings, **facts)
    results = read_results(experiment, chunk_size)
    weights = any(made.glob("*.weights"))
    text = readme(facts, settings, experiment.config.language, sample.text, results, weights)
    (made / "README.md").write_text(text, encoding="utf-8")
    text = bundle_card(experiment, source, chunk_size)
    (made / "MODEL_CARD.md").write_text(text, encoding="utf-8")
    sums = (f"{sha256(path)}  {path.name}\n" for path in sorted(made.iterdir()))
    (made / check.SUMS).write_text("".join(sums), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    made.replace(folder)


def _describe(source: Exported, made: Exported, precisions: Sequence[str]) -> None:
    """Writes export.json, with the files of the bundle instead of those that were exported."""
    description = read_json(source.description, ["files"])
    description["files"] = {path.name: file_facts(path) for path in made.files(precisions)}
    atomic.write_text(made.description, json.dumps(description, indent=2) + "\n")


def add_language_model(experiment: Experiment, chunk_size: int, folder: Path) -> dict[str, Any]:
    """Copies the language model where decoding uses one; sherpa-onnx's arguments for it.

    Raises:
        ValueError: the config wants one, and stage 8 has not made it.
    """
    scale = experiment.config.decode.language_model_scale
    if not scale or chunk_size == -1:
        return {}
    source = experiment.language_model.with_suffix(".onnx")
    if not source.is_file():
        raise ValueError(f"{source} does not exist: run stage 8, which makes it")
    shutil.copyfile(source, folder / LANGUAGE_MODEL)
    return {"lm": LANGUAGE_MODEL, "lm_scale": scale}


def choose_settings(experiment: Experiment, source: Exported, chunk_size: int) -> Settings:
    """The rules of endpoints for a tier, from the dev set; kept in exp/endpoint/<tier>/.

    Raises:
        ValueError: what an earlier stage makes is missing.
    """
    decode = experiment.config.decode.model_copy(update={"splits": ("dev",)})
    sets = test_sets(experiment.config.model_copy(update={"decode": decode})).values()
    manifests = [experiment.manifests_dir / manifest for manifest, _ in sets]
    precision = experiment.config.decode.precisions[0]
    folder = experiment.dir / "endpoint" / source.dir.name
    kept = folder / check.FILE
    stamp = Stamp(
        folder / "stamp.json",
        digests([*manifests, *source.models(precision).values()])
        | {"of": f"{DEV_UTTERANCES} {endpoint.MAY_BE_CUT} {endpoint.FLOOR} {endpoint.MARGIN}"},
    )
    if stamp.is_current(kept):
        return read_settings(folder)
    stamp.renew(kept)
    cuts = [cut for path in manifests if path.is_file() for cut in read_manifest(path)]
    chosen = cuts[:: max(1, -(-len(cuts) // DEV_UTTERANCES))]
    recordings = [samples for _, samples in Reader(chosen)]
    tail = tail_seconds(chunk_size)
    recognizer = SherpaRecognizer(source.dir, chunk_size, precision, tail_seconds=tail)
    settings = endpoint.choose(
        endpoint.hear(recognizer, recordings),
        [len(samples) / SAMPLING_RATE for samples in recordings],
    )
    if chunk_size != -1 and "default" not in settings.reasons:
        options = settings.rules | {"enable_endpoint_detection": True}
        recognizer = SherpaRecognizer(source.dir, chunk_size, precision, options=options)
        measured = endpoint.measure(recognizer, recordings, settings)
        settings = replace(settings, reasons=settings.reasons | {"measured": measured})
    write_settings(folder, settings)
    return settings


def check_bundle(folder: Path) -> int:
    """Replays a bundle's recording with sherpa-onnx and with onnxruntime; how many texts differ.

    Raises:
        ValueError: it is no bundle, or its files are not as they were.
    """
    bundle = check.read_bundle(folder)
    rows = check.compare(folder, bundle)
    samples, _ = check.read_wave(folder / "test.wav")
    tokenizer = Tokenizer(folder / "bpe.model")
    for precision in bundle["precisions"]:
        model = OnnxTransducer(folder, precision)
        search = make_search("greedy_search", model, 1, SHERPA)
        given = iter([("test.wav", samples)])
        if model.chunk_size == -1:
            found = decode_offline(model, search, given, 1)
        else:
            left = model.left_context_frames
            found = decode_streams(model, search, given, model.chunk_size, left, 1)
        ((_, hypothesis),) = found
        rows.append(("onnxruntime, icetransfer", precision, tokenizer.decode(hypothesis.tokens)))
    return check.report(bundle, rows)


def push(experiment: Experiment, repository: str, dry_run: bool) -> None:
    """Uploads the bundles of all tiers to a model hub, in one commit.

    Args:
        experiment: that `pack_tiers` has made the bundles of.
        repository: ORG/NAME.
        dry_run: print what would be uploaded, and talk to nobody.

    Raises:
        ValueError: a bundle is missing or not as it was packed, or the hub refuses.
    """
    if not hub.REPOSITORY_NAME.fullmatch(repository):
        raise ValueError(f"--push {repository}: expected a repository of a hub, as ORG/NAME")
    sizes = experiment.config.decode.chunk_sizes
    files: dict[str, Path | bytes] = {"README.md": hub_card(experiment, sizes).encode()}
    for size in sizes:
        folder = experiment.bundle_dir / Exported(experiment.onnx_dir(size)).dir.name
        if not (folder / check.SUMS).is_file():
            raise ValueError(f"{folder} is not there: run stage 11, which makes it")
        if problems := check.bad_files(folder):
            raise ValueError(f"{folder}: {problems[0]}: run stage 11 again, which makes it")
        files |= {f"{folder.name}/{path.name}": path for path in sorted(folder.iterdir())}
    total = 0
    for name, content in files.items():
        count = content.stat().st_size if isinstance(content, Path) else len(content)
        total += count
        if dry_run:
            print(f"{count:12,d}  {name}")
    if dry_run:
        print(f"{total:12,d}  bytes in {len(files)} files would go to {repository}")
        return
    log.info("uploading %d files, %.1f MB", len(files), total / 1e6)
    log.info("-> %s", hub.upload(repository, files, f"icetransfer {icetransfer.__version__}"))


def _check(folder: Path) -> None:
    if check_bundle(folder):
        sys.exit(1)


def _main() -> None:
    parser = stage_parser(__doc__, required=False)
    parser.add_argument("--check", type=Path, metavar="DIR", help="a bundle; it needs no --exp")
    parser.add_argument("--push", metavar="ORG/NAME", help="a repository of a model hub")
    parser.add_argument("--dry-run", action="store_true", help="with --push: upload nothing")
    args = parser.parse_args()
    if args.check:
        main(lambda: _check(args.check))
    elif args.exp is None:
        parser.error("--exp DIR is needed, or --check DIR")
    elif args.push:
        run_logged(
            lambda: open_experiment(enter_recipe(args.exp)),
            lambda experiment: push(experiment, args.push, args.dry_run),
        )
    else:
        run_logged(lambda: open_experiment(enter_recipe(args.exp)), pack_tiers)


if __name__ == "__main__":
    _main()
