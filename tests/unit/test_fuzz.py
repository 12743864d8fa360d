"""Whatever a file holds, it is read or refused with a message: nothing else is ever raised.

FUZZ_EXAMPLES=20000 python -m pytest tests/unit/test_fuzz.py     for longer than CI does
"""

import ast
import json
import os
from pathlib import Path

import onnx
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from icetransfer.analysis.sweep_results import read_results
from icetransfer.config import Config, load_config
from icetransfer.data.jsonl import read_jsonl_gz
from icetransfer.data.readers.folder import read_folder
from icetransfer.data.readers.json_lines import read_json_lines
from icetransfer.data.utterances import Rejection, Utterance
from icetransfer.model.checkpoint import read_checkpoint
from icetransfer.settings.errors import known_keys
from icetransfer.streaming.exported import PARTS, Exported, read_tokens
from icetransfer.streaming.metadata import check_encoder

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "500"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,  # CI sees the same examples each time
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
BASE = ["language=nl", "data.corpora={a: {kind: folder, path: x}}"]
KEYS = sorted(set(known_keys(Config)) - {"language"})

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=12)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)


@fuzz
@given(st.lists(st.tuples(st.sampled_from(KEYS), values), min_size=1, max_size=3))
def test_any_value_of_any_key(pairs) -> None:
    words = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in pairs]
    try:
        resolved = load_config([], [*BASE, *words])
    except ValueError as error:
        assert "Traceback" not in str(error) and "pydantic" not in str(error)
        assert str(error).strip()
    else:
        assert load_config([], BASE).language == resolved.language == "nl"


@fuzz
@given(st.text(max_size=40))
@example("train: [")
@example("? {a: b}")
@example("&a [*a]")
@example("!!python/object/apply:os.system [ls]")
def test_any_word_and_any_yaml(tmp_path: Path, text: str) -> None:
    conf = tmp_path / "conf.yaml"
    conf.write_text(text, encoding="utf-8", errors="surrogateescape")
    for files, words in (([conf], BASE), ([], [*BASE, text]), ([], [*BASE, f"train={text}"])):
        try:
            load_config(files, words)
        except ValueError as error:
            assert str(error).strip()


@fuzz
@given(st.binary(max_size=200))
@example("path\ttext\nä.wav\thallo\n".encode("utf-16"))
@example(b'"a.wav\tb\nc.wav\td')
@example(b"a.wav\t\x00\tb\n")
def test_any_transcripts(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "transcripts.tsv").write_bytes(content)
    try:
        found = list(read_folder(tmp_path, 10))
    except ValueError as error:
        assert "transcripts.tsv" in str(error)
    else:
        assert all(isinstance(row, Utterance | Rejection) for row in found)


@fuzz
@given(st.lists(st.dictionaries(
    st.sampled_from(["audio_filepath", "duration", "text", "offset", "speaker", "lang"]), values,
), max_size=3) | st.lists(values, max_size=3))  # fmt: skip
def test_any_json_lines(tmp_path: Path, rows) -> None:
    manifest = tmp_path / "m.json"
    manifest.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    try:
        found = list(read_json_lines(manifest, "train", tmp_path))
    except ValueError as error:
        assert "m.json" in str(error)
        return
    assert all(isinstance(row, Utterance | Rejection) for row in found)


@fuzz
@given(st.text(max_size=60))
@example("<blk> 0\na 1\n#0 2\n")
@example("<blk> 0\na 99999999999999999999\n")
def test_any_token_list(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokens.txt"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    try:
        tokens = read_tokens(path)
    except ValueError as error:
        assert "tokens.txt" in str(error)
    else:
        assert all(isinstance(token, str) for token in tokens)


COLUMNS = "language,init,hours,test_set,chunk_ms,precision,wer"


@fuzz
@given(st.lists(st.lists(scalars.map(str), min_size=7, max_size=7).map(",".join), max_size=4))
@example(["nl,en,1,t,160,fp32,1e400"])
@example(["nl,en,nan,t,160,fp32,3"])
def test_any_results(tmp_path: Path, lines) -> None:
    path = tmp_path / "results.csv"
    path.write_text("\n".join([COLUMNS, *lines]), encoding="utf-8", errors="surrogateescape")
    try:
        read_results(path)
    except ValueError as error:
        assert "results.csv" in str(error)


@fuzz
@given(st.data())
def test_any_damage_to_a_checkpoint(tmp_path: Path, base_path: Path, data) -> None:
    content = bytearray(base_path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path / "damaged.pt"
    path.write_bytes(content)
    try:
        read_checkpoint(path)
    except (ValueError, OSError) as error:
        assert "damaged.pt" in str(error)


@fuzz
@given(st.binary(max_size=100))
def test_any_manifest(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.jsonl.gz"
    path.write_bytes(content)
    try:
        list(read_jsonl_gz(path))
    except ValueError as error:
        assert "m.jsonl.gz" in str(error)


ENCODER_KEYS = (
    *("model_type", "T", "decode_chunk_len", "num_encoder_layers", "encoder_dims", "num_heads"),
    *("cnn_module_kernels", "left_context_len", "query_head_dims", "value_head_dims"),
)
said = st.one_of(
    st.none(),
    st.text(max_size=8),
    st.integers(-(2**40), 2**40).map(str),
    st.lists(st.sampled_from([0, 1, 2, 4, 8, 16, 24, 32, 45, 2**31]), max_size=4).map(
        lambda numbers: ",".join(map(str, numbers))
    ),
)


@fuzz
@given(st.dictionaries(st.sampled_from(ENCODER_KEYS), said, min_size=1, max_size=3))
def test_any_metadata_of_an_encoder(nano_bundle: Exported, changes) -> None:
    path = nano_bundle.model("encoder", "fp32")
    proto = onnx.load(str(path))
    facts = {item.key: item.value for item in proto.metadata_props}
    sizes = {
        (given.name, axis, dim.dim_value)
        for given in proto.graph.input
        for axis, dim in enumerate(given.type.tensor_type.shape.dim)
    }
    changed = {key: value for key, value in (facts | changes).items() if value is not None}
    try:
        found = check_encoder(path, changed, sizes)
    except ValueError as error:
        assert "encoder.onnx" in str(error)
    else:
        assert found == (16, 16)
        assert all(
            changed[key].split(",") == [*map(str, map(int, facts[key].split(",")))]
            or key in ("query_head_dims", "value_head_dims", "num_heads", "cnn_module_kernels")
            for key in changes
            if key != "model_type"
        )


@fuzz
@given(st.data())
def test_any_damage_to_an_onnx_file(nano_bundle: Exported, tmp_path: Path, data) -> None:
    for part in PARTS:
        (tmp_path / f"{part}.onnx").write_bytes(nano_bundle.model(part, "fp32").read_bytes())
    (tmp_path / "tokens.txt").write_bytes(nano_bundle.tokens.read_bytes())
    path = tmp_path / f"{data.draw(st.sampled_from(PARTS))}.onnx"
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([None, place]))])
    try:
        Exported(tmp_path).inspect("fp32")
    except ValueError as error:
        assert str(tmp_path) in str(error)


SOURCES = sorted((Path(__file__).parents[2] / "icetransfer").rglob("*.py"))
UNSAFE = {  # what runs code that a file holds
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "yaml.load", "shelve.open"),
    *("yaml.unsafe_load", "yaml.full_load", "dill.load", "marshal.load", "eval", "exec"),
}


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """The calls in a file, by the name that is called."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_nothing_runs_what_a_file_holds() -> None:
    found = set()
    for path in SOURCES:
        for name, call in calls(path):
            options = {word.arg: ast.unparse(word.value) for word in call.keywords}
            if name in UNSAFE and not (name == "yaml.load" and "YAML_LOADER" in ast.unparse(call)):
                found.add((path.name, name))
            if name.endswith("np.load") and options.get("allow_pickle", "False") != "False":
                found.add((path.name, name))
            if name.endswith("torch.load"):
                found.add((path.name, f"weights_only={options.get('weights_only')}"))
    # Where the user says that a file can be trusted, and only there.
    assert found == {
        ("checkpoint.py", "weights_only=not trusted"),
        ("language_model.py", "weights_only=True"),
    }
