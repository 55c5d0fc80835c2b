"""Downloads against a server on this machine that answers as the Hub and as ModelScope do."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from huggingface_hub import constants, file_download

from minimind import UserError, cli
from minimind import download as module
from minimind.download import download

CONTENT = b"".join(b'{"text": "row %d"}\n' % i for i in range(20_000))
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = "pretrain_hq.jsonl"


class Site(BaseHTTPRequestHandler):
    """One file, under the addresses of both sites; `cut` breaks every answer off after so many bytes."""

    sent, cut, size, etag, listing = [], None, len(CONTENT), SHA256, True

    def log_message(self, *_):
        pass

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def as_json(self, value):
        if type(self).listing:
            return self.answer(json.dumps(value).encode(), Content_Type="application/json")
        return self.answer(b"", 503)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        site, address = type(self), urlsplit(self.path)
        asked = {name: values[0] for name, values in parse_qs(address.query).items()}
        if address.path.startswith("/api/datasets/jingyaogong/minimind_dataset/tree/"):
            self.as_json(
                [
                    {"type": "file", "path": n, "size": 55_000_000, "oid": "0" * 40}
                    for n in (NAME, "dpo.jsonl")
                ]
            )
        elif address.path == "/repo/tree":
            self.as_json(
                {
                    "Data": {
                        "Files": [
                            {"Path": NAME, "Type": "blob", "Size": site.size, "Sha256": site.etag}
                        ]
                    }
                }
            )
        elif NAME in (address.path.rsplit("/")[-1], asked.get("FilePath")):
            self.send_file()
        else:
            self.answer(b"", 404, X_Error_Code="EntryNotFound")

    def send_file(self):
        site = type(self)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        hub = {"ETag": f'"{site.etag}"', "X-Repo-Commit": "c" * 40}
        if self.command == "HEAD":
            return self.answer(b"", Content_Length=site.size, **hub)
        site.sent.append(start)
        body = CONTENT[start:]
        headers = {**hub, "Content-Length": len(body)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
        self.send_response(206 if start else 200)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body[: site.cut])
        self.close_connection = True  # short of Content-Length if it was cut
        return None


@pytest.fixture
def site(monkeypatch):
    handler = type("Fresh", (Site,), {"sent": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    handler.address = f"http://127.0.0.1:{server.server_port}"
    template = handler.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", handler.address)  # it read HF_ENDPOINT long ago
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what a break can cost: 10 MB
    monkeypatch.setattr(module, "MODELSCOPE", handler.address + "/repo")
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
    yield handler
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_file_arrives_whole_and_is_not_fetched_twice(site, source, tmp_path, capsys):
    path = download("pretrain_hq", tmp_path, source)
    assert path == tmp_path / NAME and path.read_bytes() == CONTENT
    download(NAME, tmp_path, source)
    assert site.sent == [0] and "there already" in capsys.readouterr().out
    path.write_bytes(CONTENT[:-1] + b" ")  # same size, other content
    assert download("pretrain_hq", tmp_path, source).read_bytes() == CONTENT


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_connection_that_breaks_is_resumed_in_the_same_run(site, source, tmp_path):
    site.cut = 150_000
    assert download("pretrain_hq", tmp_path, source).read_bytes() == CONTENT
    assert site.sent == [0, 150_000, 300_000]


def test_the_next_run_goes_on_where_a_killed_one_stopped(site, tmp_path):
    partial = tmp_path / f"{NAME}.partial"
    partial.write_bytes(CONTENT[:123_456])
    assert download("pretrain_hq", tmp_path).read_bytes() == CONTENT
    assert site.sent == [123_456] and not partial.exists()


def test_a_site_that_gives_up_leaves_what_came_and_says_so(site, tmp_path):
    site.cut = 0
    partial = tmp_path / f"{NAME}.partial"
    partial.write_bytes(CONTENT[:100_000])
    with pytest.raises(UserError, match=r"broke off at 0\.1 of 0\.4 MB.*goes on from there"):
        download("pretrain_hq", tmp_path)
    assert partial.read_bytes() == CONTENT[:100_000]


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
@pytest.mark.parametrize(
    "wrong, words", [({"etag": "f" * 64}, "another sha256"), ({"size": len(CONTENT) + 5}, "")]
)
def test_wrong_content_never_gets_the_name(site, wrong, words, source, tmp_path):
    for name, value in wrong.items():
        setattr(site, name, value)
    with pytest.raises(UserError, match=words or "bytes instead of|broke off"):
        download("pretrain_hq", tmp_path, source)
    assert not (tmp_path / NAME).exists()


def test_a_partial_file_that_is_too_long_is_begun_anew(site, tmp_path):
    (tmp_path / f"{NAME}.partial").write_bytes(CONTENT + b"more")
    assert download("pretrain_hq", tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "source, there",
    [("huggingface", "55.0 MB  dpo.jsonl"), ("modelscope", "0.4 MB  pretrain_hq.jsonl")],
)
def test_a_missing_file_lists_what_is_there(site, source, there, tmp_path):
    with pytest.raises(UserError, match=f"no r1_mix_1024.jsonl in its data set(.|\n)*{there}"):
        download("r1_mix_1024", tmp_path, source)


def test_no_site_and_no_such_source(site, tmp_path, monkeypatch):
    site.listing = False
    for name, source in (("dpo", "huggingface"), ("pretrain_hq", "modelscope")):
        with pytest.raises(UserError, match=f"{source} does not answer.*--source modelscope"):
            download(name, tmp_path, source)
    with pytest.raises(
        UserError, match=r"Unknown source 'hugingface'\. Did you mean 'huggingface'"
    ):
        download("dpo", tmp_path, "hugingface")


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_missing_package_is_not_a_missing_network(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"^This needs the package huggingface_hub: pip install"):
        download("dpo", tmp_path, source)


def test_the_command_asks_the_mirror_that_hf_endpoint_names(site, tmp_path):
    environment = {
        **os.environ,
        "HF_ENDPOINT": site.address,
        "TQDM_POSITION": "-1",
    }  # as in a terminal
    command = [sys.executable, "-m", "minimind", "download", "pretrain_hq", "--to", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / NAME).read_bytes() == CONTENT and NAME in done.stderr, "progress is shown"


def test_several_at_once_on_the_command_line(site, tmp_path):
    with pytest.raises(UserError, match=r"no dpo\.jsonl"):
        cli.dispatch(["download", "pretrain_hq", "dpo", "--to", str(tmp_path)])
    assert (tmp_path / NAME).exists()
