"""Hotwords and shallow fusion: automaton, file, streams, the same words as sherpa-onnx's own."""

import itertools

import numpy as np
import onnxruntime
import pytest
import sherpa_onnx
import torch

from icetransfer.bundle.vocabulary import vocabulary
from icetransfer.data.tokenizer import Tokenizer, train_tokenizer, write_tokens
from icetransfer.decode import decode_offline, decode_streams
from icetransfer.export import Source, export_tier
from icetransfer.model.language_model import BOUNDARY_ID, LanguageModel
from icetransfer.model.transducer import build_transducer
from icetransfer.onnx.language_model import export_language_model
from icetransfer.streaming.exported import PARTS, Exported
from icetransfer.streaming.guided import GuidedBeamSearch
from icetransfer.streaming.hotwords import Hotword, HotwordGraph, read_hotwords
from icetransfer.streaming.onnx_model import OnnxTransducer
from icetransfer.streaming.search import SHERPA, ModifiedBeamSearch
from icetransfer.streaming.sherpa import SherpaRecognizer
from icetransfer.streaming.streams import StreamPool, tail_seconds

TIERS = (8, -1)
TEXTS = ("een twee drie", "vier vijf", "zes een", "drie zes vier", "tweede eenzes")


def graph_of(*phrases: tuple[int, ...], score: float = 1.0) -> HotwordGraph:
    return HotwordGraph([Hotword("", phrase, score) for phrase in phrases])


def read(graph: HotwordGraph, *tokens: int) -> tuple[list[float], int]:
    scores, state = [], 0
    for token in tokens:
        score, state = graph.step(state, token)
        scores.append(score)
    return scores, state


def test_a_phrase_earns_with_each_token_and_one_that_breaks_off_gives_back() -> None:
    graph = graph_of((1, 2, 3))
    assert read(graph, 1, 2, 3) == ([1, 1, 1], 0)
    assert read(graph, 1, 2, 9) == ([1, 1, -2], 0)
    scores, state = read(graph, 1, 2, 1)
    assert scores == [1, 1, -1] and graph.unfinished(state) == 1


def test_the_longest_suffix_that_begins_a_phrase_goes_on() -> None:
    graph = graph_of((1, 2, 3, 4), (2, 3, 5), (3, 6))
    assert sum(read(graph, 1, 2, 3, 5)[0]) == 3
    assert sum(read(graph, 1, 2, 3, 6)[0]) == 2
    assert sum(read(graph, 1, 2, 3, 4)[0]) == 4


def test_a_phrase_inside_another_and_one_that_begins_another() -> None:
    inside = graph_of((1, 2, 3, 4), (2, 3))
    assert read(inside, 1, 2, 3) == ([1, 1, 0], 0)  # the inner phrase's two are kept
    first = graph_of((1,), (1, 2))
    assert read(first, 1, 2) == ([1, 0], 0)


def test_a_shared_beginning_is_worth_the_higher_score() -> None:
    graph = HotwordGraph([Hotword("", (1, 2), 1.0), Hotword("", (1, 3), 2.5)])
    assert read(graph, 1, 2)[0] == [2.5, 1.0]
    assert read(graph, 1, 9)[0] == [2.5, -2.5]


@pytest.fixture
def letters():
    """Tokens of single letters, and what they lack."""
    known = "abcdefgh "
    return (
        lambda text: [known.index(letter) for letter in text],
        lambda text: "".join(sorted({*text} - {*known})),
    )


def test_a_file_of_hotwords(tmp_path, letters) -> None:
    path = tmp_path / "names.txt"
    path.write_text("\ufeffABBA :2.5\n\n  bad  cafe\n", encoding="utf-8")
    found = read_hotwords(path, *letters, str.lower, 1.25)
    assert found == [
        Hotword("abba", (0, 1, 1, 0), 2.5),
        Hotword("bad cafe", (1, 0, 3, 8, 2, 0, 5, 4), 1.25),
    ]


def test_every_line_that_is_wrong_is_named(tmp_path, letters) -> None:
    path = tmp_path / "names.txt"
    path.write_text("abba\nzebra\n:2 abba\nabba :x\n:1\nabba :0\n")
    with pytest.raises(ValueError) as error:
        read_hotwords(path, *letters)
    lines = str(error.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{n}" for n in (2, 3, 4, 5, 6)]
    assert "'rz', which the model cannot write" in lines[0]
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="holds no hotword"):
        read_hotwords(path, *letters)
    with pytest.raises(ValueError, match="does not exist; expected hotwords"):
        read_hotwords(tmp_path / "none.txt", *letters)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(train_tokenizer(TEXTS, 24))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, nano_dims, tokenizer):
    """A model that has learned nothing and says many things, exported streaming and offline."""
    folder = tmp_path_factory.mktemp("hotwords")
    write_tokens(tokenizer, folder / "tokens.txt")
    (folder / "bpe.vocab").write_text(vocabulary(tokenizer, TEXTS), encoding="utf-8")
    model = build_transducer(nano_dims.with_vocabulary(tokenizer.vocab_size), seed=5).eval()
    with torch.no_grad():
        model.joiner.output_linear.weight *= 2
        model.joiner.output_linear.bias[:3] = torch.tensor([0.5, -99, -99])  # no special token
    source = Source(folder / "nano.pt", model, folder / "tokens.txt", "0" * 64)
    for size in TIERS:
        export_tier(source, Exported(folder / str(size)), size, 16, [])
    return folder


@pytest.fixture(scope="module")
def recordings():
    rng = np.random.default_rng(11)
    sizes = (9000, 16000, 23000, 31000)
    return [(rng.normal(0, 0.1, size) * np.hanning(size)).astype(np.float32) for size in sizes]


def ours(exported, size, recordings, hotwords, **more):
    model = OnnxTransducer(exported / str(size))
    search = GuidedBeamSearch(model, 4, SHERPA, hotwords=HotwordGraph(hotwords), **more)
    named = ((str(number), samples) for number, samples in enumerate(recordings))
    if size == -1:
        return dict(decode_offline(model, search, named, 4))
    return dict(decode_streams(model, search, named, size, 16, 3))


def theirs(exported, size, recordings, path, score, **more):
    """What sherpa-onnx does by itself, with its own encoding of hotwords."""
    online = size != -1
    kind = sherpa_onnx.OnlineRecognizer if online else sherpa_onnx.OfflineRecognizer
    parts = {part: str(exported / str(size) / f"{part}.onnx") for part in PARTS}
    recognizer = kind.from_transducer(
        tokens=str(exported / "tokens.txt"), **parts, decoding_method="modified_beam_search",
        hotwords_file=str(path), hotwords_score=score, modeling_unit="bpe",
        bpe_vocab=str(exported / "bpe.vocab"), **more,
    )  # fmt: skip
    found = []
    tail = np.zeros(round(tail_seconds(size) * 16000), dtype=np.float32)
    for samples in recordings:
        stream = recognizer.create_stream()
        stream.accept_waveform(16000, np.concatenate([samples, tail]))
        if online:
            stream.input_finished()
            while recognizer.is_ready(stream):
                recognizer.decode_stream(stream)
            found.append(recognizer.get_result(stream))
        else:
            recognizer.decode_stream(stream)
            found.append(stream.result.text)
    return found


@pytest.mark.parametrize("size", TIERS)
def test_the_same_words_as_sherpa_onnx(exported, recordings, tokenizer, tmp_path, size) -> None:
    path = tmp_path / "hotwords.txt"
    path.write_text("een twee\nzes :0.8\neen vier\ndrie\nvierzes een :3\n")
    plain = ours(exported, size, recordings, [])
    changed = set()
    for score in (0.4, 2.0):
        hotwords = read_hotwords(path, tokenizer.encode, tokenizer.unknown_characters, str, score)
        found = ours(exported, size, recordings, hotwords)
        texts = [tokenizer.decode(found[str(n)].tokens) for n in range(len(recordings))]
        sherpas = theirs(exported, size, recordings, path, score)
        assert texts == [text.strip() for text in sherpas]
        recognizer = SherpaRecognizer(
            exported / str(size), size, search="modified_beam_search",
            tail_seconds=tail_seconds(size), hotwords=hotwords,
        )  # fmt: skip
        heard = [hypothesis.tokens for hypothesis in recognizer(recordings)]
        assert [found[str(n)].tokens for n in range(len(recordings))] == heard
        changed |= {key for key in found if found[key] != plain[key]}
    assert changed, "no hotword changed anything: the test would not see one that is ignored"


@pytest.fixture(scope="module")
def language_model(tokenizer):
    """One that has learned nothing and expects much."""
    torch.manual_seed(3)
    model = LanguageModel(tokenizer.vocab_size, 16, 2).eval()
    with torch.no_grad():
        model.embedding.weight *= 3
        model.output.weight *= 12
    return model


def test_the_exported_language_model_is_the_one_in_torch(language_model, tmp_path) -> None:
    export_language_model(language_model, tmp_path / "lm.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "lm.onnx"))
    tokens = torch.randint(3, 20, (3, 6), generator=torch.Generator().manual_seed(2))
    state = language_model.initial_state(3)
    feeds = {"h0": state[0].numpy(), "c0": state[1].numpy()}
    for column in tokens.T.unsqueeze(2):
        with torch.inference_mode():
            wanted, state = language_model(column, state)
        found, h, c = session.run(None, {"x": column.numpy(), **feeds})
        np.testing.assert_allclose(found, wanted.numpy(), atol=2e-5)
        feeds = {"h0": h, "c0": c}


def test_the_same_words_as_sherpa_onnx_with_a_language_model(
    exported, recordings, tokenizer, language_model, tmp_path
) -> None:
    export_language_model(language_model, tmp_path / "lm.onnx")
    path = tmp_path / "hotwords.txt"
    path.write_text("zes\ndrie\n")
    texts = {}
    for scale, score in ((0.0, 1e-4), (0.3, 1e-4), (0.7, 1.5)):
        hotwords = read_hotwords(path, tokenizer.encode, tokenizer.unknown_characters, str, score)
        more = {"language_model": language_model, "scale": scale}
        found = ours(exported, 8, recordings, hotwords, **more)
        texts[scale] = [tokenizer.decode(found[str(n)].tokens) for n in range(len(recordings))]
        more = {"lm": str(tmp_path / "lm.onnx"), "lm_scale": scale}
        sherpas = theirs(exported, 8, recordings, path, score, **more)
        assert texts[scale] == [text.strip() for text in sherpas]
    assert texts[0.0] != texts[0.3] != texts[0.7]


def test_fusion_earns_what_the_language_model_gives(language_model) -> None:
    """All paths of three frames, scored one by one."""

    class Frames:
        context_size = 2

        def predict(self, tokens):
            return torch.zeros(len(tokens), 1, 1)

        def join(self, out_frame, decoder_out):
            return out_frame

    vocab = language_model.sizes["vocab_size"]
    out = torch.randn(1, 3, vocab, generator=torch.Generator().manual_seed(4))
    out[..., 5:] = -99
    search = GuidedBeamSearch(Frames(), 5**3 * 5, language_model=language_model, scale=0.5)
    (found,) = search(out, torch.tensor([3]))
    totals: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(5), repeat=3):
        history = tuple(token for token in path if token)
        score = sum(float(out[0, t].log_softmax(0)[token]) for t, token in enumerate(path))
        totals[history] = float(np.logaddexp(totals.get(history, -np.inf), score))
    for history in totals:
        row = torch.tensor([[BOUNDARY_ID, *history]])
        with torch.inference_mode():
            log_probs, _ = language_model(row, language_model.initial_state(1))
        earned = sum(float(log_probs[0, at, token]) for at, token in enumerate(history))
        totals[history] += 0.5 * earned
    best = max(totals, key=lambda history: totals[history] / (len(history) + 2))
    assert found.tokens == list(best)


class OneWord:
    """In each frame a and b are nearly as likely, a a little more; blank is out of the question."""

    context_size = 2

    def predict(self, tokens):
        return torch.zeros(len(tokens), 1, 1)

    def join(self, out_frame, decoder_out):
        return torch.tensor([-9.0, -9.0, -9.0, 1.0, 0.5]).expand(len(out_frame), 1, 5)

    def initial_state(self, batch_size, chunk_size, left_context_frames):
        return _NoState(batch_size)

    def encode_chunk(self, features, state):
        return torch.zeros(len(features), 2, 1), state


class _NoState:
    def __init__(self, batch_size):
        self.batch_size = batch_size

    def tensors(self):
        return [torch.zeros(self.batch_size, 1)]

    def batch_dims(self):
        return [0]

    def with_tensors(self, tensors):
        return _NoState(len(tensors[0]))


def test_each_stream_has_hotwords_of_its_own() -> None:
    pool = StreamPool(OneWord(), GuidedBeamSearch(OneWord(), 4, hotwords=graph_of((4, 4))), 8, 16)
    (usual,) = pool.open()
    (other,) = pool.open(hotwords=graph_of((4, 3), score=3.0))
    for stream in (usual, other):
        stream.accept(np.zeros(16000, dtype=np.float32))
    assert pool.step() == [usual, other]
    (late,) = pool.open(hotwords=graph_of((3, 4), score=3.0))
    late.accept(np.zeros(16000, dtype=np.float32))
    while pool.step():
        pass
    found = [hypothesis.tokens for hypothesis in pool.close([usual, other, late])]
    for tokens, pair in zip(found, ([4, 4], [4, 3], [3, 4]), strict=True):
        assert tokens == list(itertools.islice(itertools.cycle(pair), len(tokens))) != []
    plain = StreamPool(OneWord(), ModifiedBeamSearch(OneWord(), 4), 8, 16)
    with pytest.raises(ValueError, match="this search takes none"):
        plain.open(hotwords=graph_of((4, 4)))


def test_a_phrase_that_the_end_breaks_off_counts_for_nothing_offline() -> None:
    search = GuidedBeamSearch(OneWord(), 4, hotwords=graph_of((4, 4, 4, 4), score=0.6))
    (whole,) = search(torch.zeros(1, 4, 1), torch.tensor([4]))
    (cut,) = search(torch.zeros(1, 3, 1), torch.tensor([3]))
    assert whole.tokens == [4, 4, 4, 4] and cut.tokens == [3, 3, 3]
