"""Broken inputs of every kind, and what is said of each: what is at fault, and no traceback.

A row is what is broken and a part of the message.  Commands run in this process, as a user types
them.
"""

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from icetransfer import average, decode, score, train
from icetransfer.config import load_config
from icetransfer.data import corpora as corpora_stage
from icetransfer.data import features, subset
from icetransfer.experiment import (
    Experiment,
    create_experiment,
    open_experiment,
    run_logged,
)
from icetransfer.export import export_tiers
from icetransfer.streaming.exported import Exported

BASE = ["language=nl", "data.corpora={a: {kind: folder, path: x}}"]
# Modules of commands are imported already when they are run as one.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")

Refused = Callable[..., str]


TRANSCRIBE = "icetransfer.transcribe"


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path) -> Refused:
    """Runs a command, or a stage in an experiment's folder; it must fail. Gives what it prints."""

    monkeypatch.chdir(tmp_path)

    def run(command: str | Callable[[Experiment], None], *words: object) -> str:
        with pytest.raises(SystemExit) as end:
            if callable(command):
                (folder,) = words
                run_logged(lambda: open_experiment(Path(str(folder))), command)
                pytest.fail("the stage took it")
            monkeypatch.setattr(sys, "argv", [str(command), *map(str, words)])
            run_path = runpy.run_path if str(command).endswith(".py") else runpy.run_module
            run_path(command, run_name="__main__")
        printed = "".join(capsys.readouterr())
        assert end.value.code == 2, printed
        assert "Traceback" not in printed
        # pydantic's and argparse's inner words
        assert not re.search(r"Input should|valid (integer|number|dict)|unable to parse", printed)
        return printed

    return run


def resolve(folder: Path, *words: str) -> None:
    """Makes an experiment of a config."""
    create_experiment(folder, load_config([], words))


# -- the config: a word of the command line, and what is said of it ------------------------------

WORDS = [
    ("langauge=nl", "did you mean language"),
    ("language=", "language"),
    ("language=[nl]", "language"),
    ("init=fr", "init"),
    ("hours=many", "hours"),
    ("hours=-3", "hours"),
    ("hours=0min", "hours"),
    ("hours=nan", "hours"),
    ("seed=one", "seed"),
    ("seed=1.5", "seed"),
    ("seed", "expected key=value"),
    ("=3", "expected key=value"),
    ("train", "expected key=value"),
    ("train=5", "train"),
    ("train=[", "the value of train is not YAML"),
    ("train.max_stepz=5", "did you mean train.max_steps"),
    ("train.max_steps=0", "train.max_steps"),
    ("train.max_steps=abc", "train.max_steps"),
    ("train.max_steps=1e400", "train.max_steps"),
    ("train.epochs=0", "train.epochs"),
    ("train.batch_seconds=-1", "train.batch_seconds"),
    ("train.batch_seconds=nan", "train.batch_seconds"),
    ("train.accumulate=0", "train.accumulate"),
    ("train.precision=fp8", "train.precision"),
    ("train.workers=-1", "train.workers"),
    ("train.lr=0", "train.lr"),
    ("train.lr=.inf", "train.lr"),
    ("train.schedule.kind=cosine", "train.schedule.kind"),
    ("train.schedule.warmup_steps=-1", "train.schedule.warmup_steps"),
    ("train.schedule.cooldown_fraction=2", "train.schedule.cooldown_fraction"),
    ("train.lr_scale={encodr: 2}", "train.lr_scale"),
    ("train.lr_scale={joiner: 0}", "train.lr_scale"),
    ("train.freeze={encoder: -2}", "train.freeze"),
    ("train.freeze=5", "train.freeze"),
    ("train.chunk_sizes=[28]", "multiple of 8"),
    ("train.chunk_sizes=[]", "train.chunk_sizes"),
    ("train.chunk_sizes=[a]", "train.chunk_sizes"),
    ("train.left_context_frames=[0]", "left_context_frames has [0]"),
    ("train.prune_range=1", "train.prune_range"),
    ("train.loss_backend=cuda", "train.loss_backend"),
    ("train.spec_augment.enabled=perhaps", "train.spec_augment.enabled"),
    ("train.augment=[{kind: noise, probability: 0}]", "train.augment.probability"),
    ("train.augment=[{kind: noise, snr: [10]}]", "train.augment.snr"),
    ("train.augment=[{kind: level, db: [20, -20]}]", "db is [lowest, highest]"),
    ("train.augment=[{kind: echo}]", "'level', 'silence', 'noise', 'room', 'codec'"),
    ("train.augment=strange", "expected none, default, strong"),
    ("robustness.conditions=[loud]", "robustness.conditions"),
    ("robustness.commands={opus: cat}", "cannot be the name of a condition"),
    ("robustness.chunk_size=24", "none of decode.chunk_sizes"),
    ("train.mix.share=1", "train.mix.share"),
    ("train.mix.unknown=keep", "train.mix.unknown"),
    ("train.join_seconds=-1", "train.join_seconds"),
    ("train.log_every=0", "train.log_every"),
    ("train.checkpoint_every=0", "train.checkpoint_every"),
    ("train.keep_checkpoints=0", "train.keep_checkpoints"),
    ("train.early_stop=3", "early_stop"),
    ("train.average_fraction=0", "train.average_fraction"),
    ("train.threads=0", "train.threads"),
    ("train.branches=[0]", "train.branches"),
    ("data.vocab_size=3", "data.vocab_size"),
    ("data.min_seconds=0", "data.min_seconds"),
    ("data.max_seconds=long", "data.max_seconds"),
    ("data.keep_apart=[rooms]", "data.keep_apart"),
    ("data.features.store=memory", "data.features.store"),
    ("data.features.jobs=0", "data.features.jobs"),
    ("data.features.speeds=[fast]", "data.features.speeds"),
    ("data.corpora=x", "data.corpora"),
    ("data.corpora={a: {kind: tapes}}", "data.corpora.a"),
    ("data.corpora={b: {kind: folder}}", "data.corpora.b"),
    ("data.corpora.a.kind=jsonl", "data.corpora.a"),
    ("data.corpora.a.holdout_every=-1", "data.corpora.a"),
    ("data.corpora.b={kind: synthetic, minutes: {train: -1}}", "data.corpora.b"),
    ("data.corpora.b={kind: fleurs, splits: [eval]}", "data.corpora.b"),
    ("transfer.base_models={fr: x.pt}", "transfer.base_models"),
    ("transfer.parts=[encodr]", "transfer.parts"),
    ("transfer.adapters.rank=-1", "transfer.adapters.rank"),
    ("export.int4.block_size=33", "export.int4.block_size"),
    ("export.convolutions=int4", "export.convolutions"),
    ("decode.engines=[kaldi]", "decode.engines"),
    ("decode.precisions=[fp64]", "decode.precisions"),
    ("decode.chunk_sizes=[12]", "multiple of 8"),
    ("decode.left_context_frames=0", "decode.left_context_frames"),
    ("decode.search=beam", "decode.search"),
    ("decode.beam=0", "decode.beam"),
    ("decode.splits=[train]", "decode.splits"),
    ("remedy.int8=low", "remedy.int8"),
    ("bundle.tar=maybe", "bundle.tar"),
]


@pytest.mark.parametrize(("word", "said"), WORDS, ids=[word for word, _ in WORDS])
def test_words(refused: Refused, tmp_path: Path, word: str, said: str) -> None:
    assert said in refused("icetransfer.experiment", "--exp", tmp_path / "e", *BASE, word)
    assert not (tmp_path / "e").exists()


YAML = [
    (b"train: [", "conf.yaml is not YAML"),
    (b"- a\n- b\n", "conf.yaml must hold keys and values"),
    (b"just words", "conf.yaml must hold keys and values"),
    (b"language: nl\n\tinit: en\n", "conf.yaml is not YAML"),
    (b"\xff\xfe\x00", "conf.yaml"),
    (b"!!python/object/apply:os.system [ls]", "conf.yaml is not YAML"),
    (b"train: {max_steps: ten}", "train.max_steps"),
    (b"trian: {max_steps: 10}", "did you mean train"),
    (None, "conf.yaml does not exist"),
]


@pytest.mark.parametrize(("content", "said"), YAML)
def test_config_files(refused: Refused, tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "conf.yaml").write_bytes(content)
    words = ["--exp", tmp_path / "e", "--conf", tmp_path / "conf.yaml", *BASE]
    assert said in refused("icetransfer.experiment", *words)


# -- corpora: the table of one, and what stage 1 says of it --------------------------------------

TABLES = [
    ("folder", "transcripts.tsv", b"", "corpus is empty"),
    ("folder", "transcripts.tsv", b"path\ttext\n", "corpus is empty"),
    ("folder", "transcripts.tsv", b"name\twords\na.wav\thallo\n", "a.wav: no such file"),
    ("folder", "transcripts.tsv", b"a.wav\n", "tab-separated columns"),
    ("folder", "transcripts.tsv", b"lost.wav\thallo\n", "lost.wav"),
    ("folder", "transcripts.tsv", b"noise.wav\thallo\n", "noise.wav"),
    ("folder", "transcripts.tsv", b"noise.wav\t\xff\xfe\n", "noise.wav: not UTF-8"),
    ("folder", "transcripts.tsv", b"a.wav\t\x00\tb\n", "a.wav"),
    ("folder", "other.txt", b"", "transcripts.tsv"),
    ("jsonl", "m.json", b"", "m.json"),
    ("jsonl", "m.json", b"{", "m.json"),
    ("jsonl", "m.json", b"[1, 2]", "m.json"),
    ("jsonl", "m.json", b'{"audio_filepath": "lost.wav", "duration": 1, "text": "x"}', "lost.wav"),
    ("jsonl", "m.json", b'{"audio_filepath": 3, "duration": 1, "text": "x"}', "m.json"),
    ("jsonl", "m.json", b'{"text": "x"}', "m.json"),
    ("jsonl", "m.json", b"\x1f\x8b\x08", "m.json"),
    ("jsonl", "other.json", b"", "gone.json"),
    ("cuts", "m.jsonl", b"", "m.jsonl"),
    ("cuts", "m.jsonl", b"{", "m.jsonl"),
    ("cuts", "m.jsonl", b'{"id": "a"}', "m.jsonl"),
    ("cuts", "m.jsonl", b'{"type": "MonoCut", "id": 3}', "m.jsonl"),
    ("cuts", "m.jsonl.gz", b"no gzip", "m.jsonl.gz"),
    ("cuts", "other.jsonl", b"", "gone.jsonl"),
    ("fleurs", "nl_nl/train.tsv", b"x", "nl_nl"),
    ("mls", "mls_dutch_opus/train/transcripts.txt", b"x", "mls_dutch"),
    ("common_voice", "cv/nl/train.tsv", b"client_id\tpath\n", "expected nl/clips"),
    ("common_voice", "nothing", b"", "no Common Voice here"),
    ("voxpopuli", "nl/asr_train.tsv", b"id\n", "asr_test.tsv does not exist"),
]


@pytest.mark.parametrize(("kind", "name", "content", "said"), TABLES)
def test_tables(
    refused: Refused, tmp_path: Path, kind: str, name: str, content: bytes, said: str
) -> None:
    corpus = tmp_path / "corpus"
    (corpus / name).parent.mkdir(parents=True)
    (corpus / name).write_bytes(content)
    (corpus / "noise.wav").write_bytes(b"RIFF no audio")
    settings = {"kind": kind, "path": str(corpus)}
    if kind in ("jsonl", "cuts"):
        settings = {"kind": kind, "train": [str(corpus / name.replace("other", "gone"))]}
        (corpus / name).rename(corpus / name.replace("other", "m"))
    corpora = f"data.corpora={json.dumps({'c': settings})}"
    resolve(tmp_path / "e", "language=nl", f"data.dir={tmp_path / 'data'}", corpora)
    assert said in refused(corpora_stage.prepare, tmp_path / "e")


# -- files of a finished experiment, each damaged in several ways --------------------------------


@pytest.fixture(scope="module")
def finished(prepare) -> Experiment:
    """An experiment with all its stages done up to the export."""
    words = ("decode.engines=[onnxruntime]", "decode.precisions=[fp32]", "decode.chunk_sizes=[16]")
    experiment = prepare("finished", *words)
    for stage in (train.train, average.average_run, export_tiers):
        stage(experiment)
    return experiment


STAGES = {
    "data.features": features.compute_features,
    "data.subset": subset.make_subset,
    "train": train.train,
    "average": average.average_run,
    "export": export_tiers,
    "decode": decode.decode_all,
    "score": score.results_table,
}
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) * 2 // 3],
    "noise": lambda content: b"\x00\xff{]" * 20,
    "other": lambda content: b"[]",
}
ALL = tuple(DAMAGES)
FILES = [
    ("experiment", "exp/config.yaml", ALL[1:], "score"),
    ("manifest of stage 1", "data/manifests/tones_train.jsonl.gz", ALL, "data.features"),
    ("manifest of stage 2", "data/manifests/tones_train_fbank.jsonl.gz", ALL, "data.subset"),
    ("dev manifest", "data/manifests/tones_dev_fbank.jsonl.gz", ("cut", "noise"), "train"),
    ("subset's record", "data/manifests/subset-all.json", ALL, "train"),
    ("tokens", "exp/lang/bpe.model", ("empty", "cut", "noise"), "train"),
    ("token list", "exp/lang/tokens.txt", ALL, "export"),
    ("start", "exp/init.pt", ALL, "train"),
    ("blocks' index", "exp/train_data/index.json", ALL, "train"),
    ("scheme", "exp/scheme.json", ALL, "train"),
    ("provenance", "exp/provenance.json", ALL, "average"),
    ("checkpoint", "exp/checkpoints/checkpoint-8.pt", ALL, "average"),
    ("average", "exp/averaged.pt", ALL, "export"),
    ("export's record", "exp/onnx/chunk-16-left-128/export.json", ALL, "export"),
    ("encoder", "exp/onnx/chunk-16-left-128/encoder.onnx", ALL, "decode"),
    ("joiner", "exp/onnx/chunk-16-left-128/joiner.onnx", ALL, "decode"),
]
ROWS = [(what, path, damage, stage) for what, path, all_, stage in FILES for damage in all_]


@pytest.mark.parametrize(
    ("path", "damage", "stage"),
    [row[1:] for row in ROWS],
    ids=[f"{what}-{damage}" for what, _, damage, _ in ROWS],
)
def test_files(
    refused: Refused, finished: Experiment, tmp_path: Path, path: str, damage: str, stage: str
) -> None:
    root, _, name = path.partition("/")
    target = (finished.dir if root == "exp" else finished.data_dir) / name
    before = {file: file.read_bytes() for file in written(finished)}
    hide = {  # what has to be made again, so that the stage reads the file at all
        "data.features": ["data/manifests/tones_train_fbank.jsonl.gz"],
        "data.subset": ["data/manifests/subset-all.txt"],
        "average": ["exp/averaged.pt"],
        "train": ["exp/checkpoints/*.pt", "exp/scheme.json"],
    }
    try:
        for pattern in hide.get(stage, ()):
            root, _, wanted = pattern.partition("/")
            for file in (finished.dir if root == "exp" else finished.data_dir).glob(wanted):
                if file != target:
                    file.unlink()
        target.write_bytes(DAMAGES[damage](before[target]))
        assert target.name in refused(STAGES[stage], finished.dir)
    finally:
        for file in written(finished) - before.keys():
            file.unlink()
        for file, content in before.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


def written(experiment: Experiment) -> set[Path]:
    """All that the stages have written but logs."""
    found = [*experiment.dir.rglob("*"), *experiment.manifests_dir.rglob("*")]
    found += (experiment.data_dir / "fbank").rglob("*")
    return {path for path in found if path.is_file() and path.suffix not in (".log", ".lock")}


# -- token lists and checkpoints of others -------------------------------------------------------

LIST = "<blk> 0\n<sos/eos> 1\n<unk> 2\n" + "".join(f"t{n} {n}\n" for n in range(3, 20))
TOKENS = [
    ("", 'tokens.txt:1: expected "token 0"'),
    ("\n", "tokens.txt:1"),
    ("<blk>\n", "tokens.txt:1"),
    ("a 0\nb 1\n", "the first token must be blank"),
    ("<blk> 0\na 2\n", 'tokens.txt:2: expected "token 1"'),
    ("<blk> 0\na 1\na 1\n", "tokens.txt:3"),
    ("<blk> 0\na one\n", "tokens.txt:2"),
    ("<blk> 0\n\nb 2\n", "tokens.txt:2"),
    ("<blk> 0\na 99999999999999999999\n", "tokens.txt:2"),
    ("<blk> -1\n", "tokens.txt:1"),
    ("<blk> 0\na 1\n", "tokens.txt has 2 tokens"),
    (LIST + "t20 20\n", "tokens.txt has 21 tokens"),
    (LIST + "#0 20\n#1 22\n", "tokens.txt:22"),
    (LIST.replace(" ", ","), "tokens.txt:1"),
    ("<blk> 0\r\na 1\r\n", "tokens.txt"),
    ("\ufeff" + LIST, "tokens.txt:1"),
    ("\udcff 0\n", "tokens.txt"),
    (None, "tokens.txt does not exist"),
]


@pytest.mark.parametrize(("content", "said"), TOKENS)
def test_token_lists(
    refused: Refused, base_path: Path, tmp_path: Path, content: str | None, said: str
) -> None:
    path = tmp_path / "tokens.txt"
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))
    words = [f"checkpoint={base_path}", f"tokens={path}", f"out={tmp_path / 'o'}"]
    assert said in refused("icetransfer.export", *words)


def without(name: str) -> Callable[[dict], dict]:
    """Takes what has a name, or begins with it, out of the weights."""
    return lambda content: (
        content
        | {
            "model": {
                key: value for key, value in content["model"].items() if not key.startswith(name)
            }
        }
    )


def reshaped(content: dict) -> dict:
    name = "encoder_embed.out.weight"
    return content | {"model": content["model"] | {name: torch.zeros(3, 3)}}


CHECKPOINTS: list[tuple[str, Callable[[dict], object], str]] = [
    ("nothing", lambda content: {}, "no weights"),
    ("list", lambda content: [1, 2], "holds a list"),
    ("tensor", lambda content: torch.zeros(3), "holds a Tensor"),
    ("no encoder", without("encoder.encoders"), "expected a causal Zipformer"),
    ("no joiner", without("joiner"), "m.pt"),
    ("no decoder", without("decoder"), "m.pt"),
    ("no norm", without("encoder.encoders.0.layers.0.norm"), "m.pt"),
    ("other shape", reshaped, "m.pt does not fit"),
    ("conformer", lambda c: {"model": {"encoder.layers.0.x": torch.ones(1)}}, "Conformer"),
    ("unknown", lambda c: {"model": {"a.b": torch.ones(1)}}, "another model, with parameters"),
    ("format", lambda c: c | {"icetransfer": c["icetransfer"] | {"format": 9}}, "format 9"),
    ("no dims", lambda c: c | {"icetransfer": {"format": 1}}, "m.pt"),
    ("dims are text", lambda c: c | {"icetransfer": {"format": 1, "dims": "x"}}, "m.pt"),
    ("metadata is text", lambda c: c | {"icetransfer": "x"}, "m.pt"),
]


@pytest.mark.parametrize(
    ("change", "said"), [row[1:] for row in CHECKPOINTS], ids=[row[0] for row in CHECKPOINTS]
)
def test_checkpoints(refused: Refused, base_path: Path, tmp_path: Path, change, said: str) -> None:
    content = torch.load(base_path, weights_only=True)
    torch.save(change(content), tmp_path / "m.pt")
    (tmp_path / "tokens.txt").write_text(LIST)
    words = [f"checkpoint={tmp_path / 'm.pt'}", f"tokens={tmp_path / 'tokens.txt'}"]
    printed = refused("icetransfer.export", *words, f"out={tmp_path / 'o'}")
    assert said in printed and "m.pt" in printed


# -- bundles -------------------------------------------------------------------------------------

METADATA = [
    ("encoder", "model_type", "conformer"),
    ("encoder", "model_type", None),
    ("encoder", "T", "44"),
    ("encoder", "T", "x"),
    ("encoder", "T", None),
    ("encoder", "decode_chunk_len", "64"),
    ("encoder", "decode_chunk_len", "-32"),
    ("encoder", "decode_chunk_len", None),
    ("encoder", "num_encoder_layers", "1"),
    ("encoder", "num_encoder_layers", "1,9"),
    ("encoder", "num_encoder_layers", "2147483647,1"),
    ("encoder", "encoder_dims", "16,25"),
    ("encoder", "encoder_dims", "16;24"),
    ("encoder", "cnn_module_kernels", "7,31"),
    ("encoder", "left_context_len", "16,16"),
    ("encoder", "left_context_len", ""),
    ("encoder", "query_head_dims", "8"),
    ("encoder", "value_head_dims", "4,0"),
    ("encoder", "num_heads", "2,4"),
    ("encoder", "num_heads", "99999999999,2"),
    ("decoder", "vocab_size", "21"),
    ("decoder", "vocab_size", None),
    ("decoder", "vocab_size", "many"),
    ("decoder", "context_size", "3"),
    ("decoder", "context_size", "0"),
    ("joiner", "joiner_dim", "17"),
    ("joiner", "joiner_dim", "1.5"),
    ("joiner", "joiner_dim", None),
]


@pytest.mark.parametrize(("part", "key", "value"), METADATA)
def test_metadata(
    refused: Refused, nano_bundle: Exported, tmp_path: Path, part: str, key: str, value: str | None
) -> None:
    bundle = Exported(tmp_path)
    for path in nano_bundle.files(["fp32"]):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    proto = onnx.load(str(bundle.model(part, "fp32")))
    facts = {item.key: item.value for item in proto.metadata_props} | {key: value}
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, {k: v for k, v in facts.items() if v is not None})
    onnx.save(proto, str(bundle.model(part, "fp32")))
    printed = refused(TRANSCRIBE, "--bundle", tmp_path, "a.wav")
    assert re.search(r"(encoder|decoder|joiner)\.onnx", printed)


# -- results -------------------------------------------------------------------------------------

HEADER = "language,init,hours,test_set,chunk_ms,precision,wer\n"
RESULTS = [
    ("", "results.csv"),
    ("wer\n1\n", "results.csv lacks the columns language"),
    (HEADER, "results.csv has no results"),
    (HEADER + "nl,en\n", "results.csv:2"),
    (HEADER + "nl,en,1,t,160,fp32,low\n", "results.csv:2"),
    (HEADER + "nl,en,one,t,160,fp32,9\n", "results.csv:2"),
    (HEADER + "nl,en,-1,t,160,fp32,9\n", "results.csv:2"),
    (HEADER + "nl,en,1,t,160.5,fp32,9\n", "results.csv:2"),
    (HEADER + "nl,en,1,t,160,fp32,nan\n", "results.csv:2"),
    (HEADER + "nl,en,1,t,160,fp32,-3\n", "results.csv:2"),
    (HEADER + 2 * "nl,en,1,t,160,fp32,9\n", "results.csv: two lines of nl"),
    (HEADER + "nl,en,1,t,160,fp32,9\n", "no language has both"),
    ("\udcff" + HEADER, "results.csv"),
    (HEADER.strip() + ",engine\nnl,en,1,t,160,fp32,9,kaldi\n", "engine 'kaldi'"),
    (HEADER.strip() + ",errors\nnl,en,1,t,160,fp32,9,x\n", "results.csv:2"),
    (HEADER + "nl,en,1,t,160,fp32,9\nnl,ml,1,t,160,fp32,\x00\n", "results.csv"),
]


@pytest.mark.parametrize(("content", "said"), RESULTS)
def test_results(refused: Refused, tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "results.csv"
    path.write_bytes(content.encode(errors="surrogateescape"))
    words = ["--results", path, "--out", tmp_path / "gap"]
    assert said in refused("icetransfer.gap", *words)


PLANS = [
    ("", "plan.csv lacks the columns language, hours"),
    ("language\nnl\n", "plan.csv lacks the columns hours"),
    ("language,hours\n", "plan.csv has no line"),
    ("language,hours\nnl,many\n", "plan.csv:2: hours many"),
    ("language,hours\nnl,0\n", "plan.csv:2: hours 0"),
    ("language,hours,chunk_ms\nnl,3,fast\n", "plan.csv:2"),
    ("language,hours\nnl\n", "plan.csv:2"),
    ("\udcff", "plan.csv"),
]


@pytest.mark.parametrize(("content", "said"), PLANS)
def test_plans(refused: Refused, tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "plan.csv"
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert said in refused("icetransfer.recommend", "--plan", path)


WHOLE = '{"id": "a", "ref": "een", "hyp": "een"}\n'
RECOGS = [
    ("", "recogs.jsonl"),
    ("{", "recogs.jsonl:1"),
    ("[]\n", "recogs.jsonl:1"),
    ('{"id": "a"}\n', "recogs.jsonl:1"),
    (2 * WHOLE, "stands twice"),
    (WHOLE + WHOLE[:20], "recogs.jsonl:2"),
    ('{"id": "a", "ref": "", "hyp": "een"}\n', "recogs.jsonl: no reference has a word"),
    ('{"id": "a", "ref": 3, "hyp": "een"}\n', "recogs.jsonl:1"),
    ('{"id": "a", "ref": "een", "hyp": null}\n', "recogs.jsonl:1"),
    ("\udcff\n", "recogs.jsonl"),
]


@pytest.mark.parametrize(("content", "said"), RECOGS)
def test_recogs(refused: Refused, tmp_path: Path, content: str, said: str) -> None:
    path, other = tmp_path / "recogs.jsonl", tmp_path / "other.jsonl"
    path.write_bytes(content.encode(errors="surrogateescape"))
    other.write_text(WHOLE)
    assert said in refused("icetransfer.score", "--compare", path, other)


WER = {
    "test_set": "t", "engine": "torch", "precision": "fp32", "chunk_size": 16,
    "left_context_frames": 128, "search": "greedy_search", "wer": 9.0, "cer": 1.0,
    "insertions": 0, "deletions": 0, "substitutions": 1, "words": 11, "failed": 0, "rtf": 0.1,
    "model_bytes": 3,
}  # fmt: skip
WERS = [
    ("{", "wer.json is damaged"),
    ("[]", "wer.json holds list"),
    (json.dumps({**WER, "wer": "low"}), "wer.json: wer is 'low'"),
    (json.dumps({**WER, "chunk_size": None}), "wer.json: chunk_size is None"),
    (json.dumps({k: v for k, v in WER.items() if k != "cer"}), "wer.json lacks cer"),
]


@pytest.mark.parametrize(("content", "said"), WERS)
def test_wer_files(refused: Refused, tmp_path: Path, content: str, said: str) -> None:
    resolve(tmp_path / "e", *BASE, f"data.dir={tmp_path / 'data'}")
    path = tmp_path / "e" / "decode" / "t" / "torch" / "wer.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert said in refused("icetransfer.score", "--exp", tmp_path / "e")


# -- options -------------------------------------------------------------------------------------

OPTIONS = [
    ("icetransfer.train", "", "--exp"),
    ("icetransfer.train", "--exp lost", "lost/config.yaml does not exist"),
    ("icetransfer.train", "--exp lost --branch few", "--branch"),
    ("icetransfer.score", "--exp lost", "lost/config.yaml does not exist"),
    ("icetransfer.score", "--compare a.jsonl", "--compare"),
    ("icetransfer.score", "--compare a.jsonl b.jsonl", "a.jsonl does not exist"),
    ("icetransfer.score", "--xep d", "--exp"),
    ("icetransfer.export", "checkpoint=a.pt", "tokens=, out= not given"),
    ("icetransfer.export", "checkpoint=a.pt tokens=t out=o chunk_size=x", "chunk_size=x"),
    ("icetransfer.export", "checkpoint=a.pt tokens=t out=o precisions=int2", "precisions=int2"),
    ("icetransfer.export", "checkpoint=a.pt tokens=t out=o left_context_frames=0", "left_context"),
    ("icetransfer.export", "checkpoint=a.pt tokens=t out=o chunk=16", "unknown dimension chunk"),
    ("icetransfer.export", "checkpoint=a.pt tokens=t out=o", "checkpoint a.pt does not exist"),
    ("icetransfer.export", "checkpoint=a.pt tokens=t out=o export.int9=1", "export.int9"),
    ("icetransfer.average", "checkpoints=a.pt", "expected checkpoints="),
    ("icetransfer.average", "checkpoints=a.pt out=o.pt", "a.pt does not exist"),
    ("icetransfer.average", "checkpoints=. out=o.pt last=0", "last=0"),
    ("icetransfer.average", "checkpoints=. out=o.pt last=3", "has 0 checkpoints"),
    ("icetransfer.average", "checkpoints=a.pt out=o.pt method=mean", "method=mean"),
    ("icetransfer.gap", "--results lost.csv --out o", "lost.csv does not exist"),
    ("icetransfer.gap", "--results lost.csv --out o --margin 0", "--margin 0"),
    ("icetransfer.gap", "--results lost.csv --out o --threshold nan", "--threshold nan"),
    ("icetransfer.gap", "--out o", "--results"),
    ("icetransfer.recommend", "", "--hours"),
    ("icetransfer.recommend", "--hours few", "hours few"),
    ("icetransfer.recommend", "--hours -1", "hours -1"),
    ("icetransfer.recommend", "--hours 3 --chunk-ms fast", "--chunk-ms"),
    ("icetransfer.recommend", "--hours 3 --results lost.csv", "lost.csv does not exist"),
    ("icetransfer.recommend", "--plan lost.csv", "lost.csv does not exist"),
    ("icetransfer.report.__main__", "--results lost", "lost/plan.json does not exist"),
    ("icetransfer.sweep.__main__", "--preset lost", "lost"),
    ("icetransfer.sweep.__main__", "--preset mini --inits fr", "fr"),
    ("icetransfer.sweep.__main__", "--preset mini --hours many", "many"),
    ("icetransfer.sweep.__main__", "--preset mini --tiers fast", "fast"),
    ("icetransfer.sweep.__main__", "--preset mini --seeds no", "--seeds"),
    ("icetransfer.sweep.__main__", "--preset mini --langs tlh", "tlh"),
    ("icetransfer.new_recipe", "", "code"),
    ("icetransfer.new_recipe", "!! X", "!!"),
    (TRANSCRIBE, "--bundle lost a.wav", "lost is not a folder"),
    (TRANSCRIBE, "--bundle . a.wav", "is not a bundle"),
    (TRANSCRIBE, "a.wav", "--bundle"),
]


@pytest.mark.parametrize(
    ("command", "words", "said"), OPTIONS, ids=[f"{Path(row[0]).name} {row[1]}" for row in OPTIONS]
)
def test_options(refused: Refused, command: str, words: str, said: str) -> None:
    assert said in refused(command, *words.split())


def test_there_are_two_hundred() -> None:
    tables = (WORDS, YAML, TABLES, ROWS, TOKENS, CHECKPOINTS, METADATA, RESULTS, PLANS, RECOGS)
    assert sum(map(len, (*tables, WERS, OPTIONS))) >= 200
