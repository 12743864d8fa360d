"""icetransfer.serve over real websockets: words, limits, and who is sent away."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import soundfile
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from icetransfer import serve as command
from icetransfer import transcribe
from icetransfer.serving.columns import Column, find_columns, labels
from icetransfer.serving.session import Limits
from icetransfer.serving.site import listening_socket

FP32, INT8 = "nl-ml/320/fp32", "nl-ml/320/int8"
START = {"type": "start", "rate": 16000, "columns": [FP32, INT8]}
END = json.dumps({"type": "end"})


@pytest.fixture(scope="module")
def site(serve):
    with serve() as site:
        yield site


@pytest.fixture(scope="module")
def speech(bundle):
    samples, _ = soundfile.read(next(bundle.glob("*/test.wav")), dtype="int16")
    return samples


CLIENTS = contextlib.ExitStack()


@pytest.fixture(autouse=True)
def clients_end():
    with CLIENTS:
        yield


def join(site, **headers):
    address = f"ws://127.0.0.1:{site.port}/speech"
    return CLIENTS.enter_context(connect(address, proxy=None, **headers))


def begin(site, tree=None):
    """A client that may speak."""
    client = join(site)
    client.send(json.dumps(tree or START))
    assert json.loads(client.recv()) == {"type": "ready"}
    return client


def rest(client):
    """What the server says until it closes, and how it closes."""
    told = []
    try:
        while True:
            told.append(json.loads(client.recv(timeout=20)))
    except ConnectionClosed as end:
        return told, end.rcvd


def say(client, samples, block=800):
    for start in range(0, len(samples), block):
        client.send(samples[start : start + block].tobytes())


def words(told, column):
    return [
        word
        for message in told
        if message.get("column") == column
        for segment in message["ended"]
        for word in segment
    ]


def by_transcribe(bundle, precision, path, monkeypatch, capsys):
    """The same words, as transcribe writes them."""
    typed = ["transcribe", "--bundle", bundle, "--precision", precision, "--json", path]
    monkeypatch.setattr(sys, "argv", [*map(str, typed)])
    transcribe._main()
    segments = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [
        [word["word"], word["start"], word["end"], word["confidence"]]
        for segment in segments
        for word in segment["words"]
    ]


def test_the_words_are_those_of_transcribe(site, bundle, speech, monkeypatch, capsys) -> None:
    one, other = begin(site), begin(site)
    for client in (one, other):  # they are decoded together
        say(client, speech)
        client.send(END)
    wanted = {
        column: by_transcribe(bundle, precision, path, monkeypatch, capsys)
        for column, precision in ((FP32, "fp32"), (INT8, "int8"))
        for path in bundle.glob("*/test.wav")
    }
    for client in (one, other):
        told, closed = rest(client)
        assert told[-1] == {"type": "done"} and closed.code == 1000
        for column in (FP32, INT8):
            found = words(told, column)
            assert len(found) > 40
            assert [word[:3] for word in found] == [word[:3] for word in wanted[column]]
            gap = np.subtract([w[3] for w in found], [w[3] for w in wanted[column]])
            assert abs(gap).max() < 0.01
            heard = [m for m in told if m.get("column") == column]
            assert heard[-1]["seconds"] == round(len(speech) / 16000, 2) and heard[-1]["cpu"] > 0
            assert heard[0]["partial"] and not heard[-1]["partial"]


def test_the_rate_may_change(site, speech) -> None:
    client = begin(site, START | {"rate": 48000})
    client.send(np.zeros(24000, np.int16).tobytes())
    client.send(json.dumps({"type": "rate", "rate": 8000}))
    client.send(np.zeros(8000, np.int16).tobytes())
    client.send(END)
    told, closed = rest(client)
    assert closed.code == 1000
    assert told[-2].get("seconds", told[-3].get("seconds")) == pytest.approx(1.5, abs=0.02)


def test_the_load_is_told(site) -> None:
    client = begin(site)
    client.send(np.zeros(1600, np.int16).tobytes())
    found = next(m for m in iter(lambda: json.loads(client.recv(timeout=20)), None) if "cores" in m)
    assert found["streams"] == 2 and found["behind"] < 1 and found["cpu"] > 0
    client.close()


LONG = json.dumps({"type": "x" * (1 << 18)})
GARBAGE = {
    "not JSON": ("{", 1003, "not a JSON object"),
    "no object": ("[1]", 1003, "not a JSON object"),
    "deep": ("[" * 50_000, 1003, "not a JSON object"),
    "audio first": (b"\0\0", 1003, "not a JSON object"),
    "no start": ('{"type": "end"}', 1003, "first"),
    "no column": (json.dumps(START | {"columns": ["x"]}), 1008, "no column 'x'"),
    "a column twice": (json.dumps(START | {"columns": [FP32, FP32]}), 1008, "twice"),
    "no list": (json.dumps(START | {"columns": [[]]}), 1008, "no column"),
    "rate": (json.dumps(START | {"rate": 1e9}), 1003, "rate of"),
    "size": (LONG, 1009, ""),
}
LATER = {
    "odd bytes": (b"\0", 1003, "not 16-bit PCM"),
    "type": ('{"type": "x"}', 1003, "of type 'x'"),
    "rate": ('{"type": "rate", "rate": "fast"}', 1003, "rate of 'fast'"),
    "size": (b"\0" * (1 << 18), 1009, ""),
}


@pytest.mark.parametrize(("sent", "code", "why"), GARBAGE.values(), ids=GARBAGE)
def test_garbage_at_the_start_is_closed_and_said(site, sent, code, why, caplog) -> None:
    client = join(site)
    client.send(sent)
    told, closed = rest(client)
    assert closed.code == code
    assert [m["message"] for m in told if why in m["message"]] or not why
    wait_for(lambda: "closed: " in caplog.text and why in caplog.text)


@pytest.mark.parametrize(("sent", "code", "why"), LATER.values(), ids=LATER)
def test_garbage_later_is_closed_and_said(site, sent, code, why, caplog) -> None:
    client = begin(site)
    client.send(sent)
    _, closed = rest(client)
    assert closed.code == code
    wait_for(lambda: "closed: " in caplog.text and why in caplog.text)


def wait_for(is_so) -> None:
    end = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_is_not_http_is_closed_and_said(site, caplog) -> None:
    with socket.create_connection(("127.0.0.1", site.port)) as client:
        client.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert client.recv(100) == b""
    wait_for(lambda: "HTTP request" in caplog.text)


def test_too_fast_is_closed_and_said(serve, speech, caplog) -> None:
    with serve(Limits(ahead=1.0)) as site:
        client = begin(site)
        with contextlib.suppress(ConnectionClosed):
            for _ in range(20):
                say(client, speech, 16000)
        told, closed = rest(client)
        assert closed.code == 1008 and "too fast" in told[-1]["message"]
        assert "too fast" in caplog.text
        client = begin(site)  # little speech, in too many messages
        with contextlib.suppress(ConnectionClosed):
            say(client, speech[:2000], 1)
        assert rest(client)[1].code == 1008


def test_too_long_too_quiet_and_too_many(serve, speech) -> None:
    with serve(Limits(seconds=1.0, idle=0.3, streams=2)) as site:
        client = begin(site)
        full = join(site)
        full.send(json.dumps(START))
        told, closed = rest(full)
        assert closed.code == 1013 and "2 streams are open" in told[0]["message"]
        say(client, speech)
        assert "1 s of speech are the most" in rest(client)[0][-1]["message"]
        told, closed = rest(begin(site))
        assert closed.code == 1008 and "nothing came for 0.3 s" in told[-1]["message"]


def test_a_client_that_vanishes_is_said_and_forgotten(serve, speech, caplog) -> None:
    with serve(Limits(streams=2, ping=0.2)) as site:
        client = begin(site)
        say(client, speech[:8000])
        client.socket.shutdown(socket.SHUT_RDWR)
        wait_for(lambda: "vanished after" in caplog.text)
        silent = begin(site)  # its place is free again
        with silent.protocol_mutex:  # the network is gone: it answers no ping
            wait_for(lambda: caplog.text.count(" after ") > 1)
        begin(site).close()


class Sleeper:
    """A model that takes a second for whatever comes."""

    def accept(self, samples):
        time.sleep(0.5)
        return []

    def finish(self):
        return []

    def partial(self):
        return None


def test_models_that_are_too_slow_are_said(serve, columns, speech) -> None:
    slow = Column("slow", "offline", "fp32", columns[0].exported, -1, Sleeper)
    with serve(Limits(behind=0.5), [slow]) as site:
        client = begin(site, START | {"columns": [slow.id]})
        with contextlib.suppress(ConnectionClosed):
            say(client, speech)
        told, closed = rest(client)
        assert closed.code == 1013 and "behind: choose fewer columns" in told[-1]["message"]


def test_a_model_that_fails_ends_its_clients_and_no_others(serve, columns, speech, caplog) -> None:
    class Failing(Sleeper):
        def accept(self, samples):
            raise RuntimeError("out of order")

    bad = Column("bad", "offline", "fp32", columns[0].exported, -1, Failing)
    with serve(offered=[bad, *columns]) as site:
        client, other = begin(site, START | {"columns": [bad.id]}), begin(site)
        say(client, speech[:800])
        client.send(END)
        assert "the model failed: out of order" in rest(client)[0][-1]["message"]
        say(other, speech[:8000])
        other.send(END)
        assert rest(other)[0][-1] == {"type": "done"}


def test_pages_of_others_may_not_listen(site, caplog) -> None:
    own = f"http://127.0.0.1:{site.port}"
    join(site, origin=own)
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": own + "1"},
        {"origin": "null"},
        {"origin": "http://evil.example", "additional_headers": {"Host": "evil.example"}},
    ):
        with pytest.raises((InvalidStatus, ValueError)) as refused:
            join(site, **headers)
        assert "403" in str(refused.value) and "refused" in caplog.text
        caplog.clear()


def get(site, path, **headers):
    request = urllib.request.Request(f"http://127.0.0.1:{site.port}{path}", headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=10) as answer:
        return answer.headers, answer.read()


def test_the_page_and_its_files(site, bundle) -> None:
    headers, page = get(site, "/")
    assert headers["Content-Type"].startswith("text/html") and b"<h1>" in page
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert b"://" not in page  # nothing comes from elsewhere
    found = json.loads(get(site, "/columns.json")[1])
    assert [column["id"] for column in found["columns"]] == [FP32, INT8]
    assert found["recordings"][0]["text"] == "Eén keer."
    recording = get(site, found["recordings"][0]["url"])[1]
    assert recording == next(bundle.glob("*/test.wav")).read_bytes()
    for path in ("/nothing", "/../site.py", "/recordings/1.wav"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(site, path)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        get(site, "/", Host="evil.example")


def test_what_an_address_may_be() -> None:
    with listening_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} is in use.*--port"):
            listening_socket("127.0.0.1", port)
    with pytest.raises(ValueError, match="does not belong to this machine"):
        listening_socket("192.0.2.1", 0)
    with pytest.raises(ValueError, match="expected a name of this machine"):
        listening_socket("no such name.invalid", 0)


def test_bundles_that_are_not_whole(bundle, tmp_path, caplog) -> None:
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    (tier,) = folder.iterdir()
    (tier / "joiner.int8.onnx").unlink()
    assert [column.precision for column in find_columns([folder])] == ["fp32"]
    assert "left out" in caplog.text and "joiner.int8.onnx missing" in caplog.text
    (tier / "tokens.txt").unlink()
    with pytest.raises(ValueError, match=r"tokens.txt missing"):
        find_columns([folder])
    (tier / "bundle.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"is of version 99.*pack the bundle again"):
        find_columns([folder])
    with pytest.raises(ValueError, match="is not a folder"):
        find_columns([tmp_path / "none"])


def test_bundles_have_short_names(tmp_path) -> None:
    one, other = tmp_path / "nl" / "en" / "bundle", tmp_path / "nl" / "ml" / "bundle"
    assert labels([one, other]) == ["en", "ml"]
    assert labels([one / "chunk-16-left-64", other]) == ["en", "ml"]
    assert labels([one, tmp_path / "de" / "en" / "bundle"]) == ["nl/en", "de/en"]
    assert labels([one / "a", one / "b"]) == ["a", "b"]
    assert labels([tmp_path / "onnx"]) == ["onnx"]
    with pytest.raises(ValueError, match="the same folder was given twice"):
        labels([one, one])


def test_ctrl_c_ends_it_in_one_line(bundle) -> None:
    words = [sys.executable, "-m", "icetransfer.serve", "--bundle", bundle, "--port", "0"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as child:
        first = [child.stderr.readline(), child.stderr.readline()]
        child.send_signal(signal.SIGINT)
        rest = child.stderr.read()
    assert first[0] == "nl-ml: 320; fp32, int8\n"
    assert first[1].startswith("open http://localhost:")
    assert (rest, child.returncode) == ("ended; 0 listened\n", 0)


def test_a_port_that_is_taken_is_said_by_the_command(bundle, monkeypatch, capsys) -> None:
    with listening_socket("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setattr(sys, "argv", ["serve", "--bundle", str(bundle), "--port", port])
        with pytest.raises(SystemExit) as end:
            command._main()
    assert end.value.code == 2 and f"port {port} is in use" in capsys.readouterr().err
