"""Published weights, fetched from a real server on this machine."""

import hashlib
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from features.backbones import download
from features.backbones.download import cached, fetch
from features.errors import BackboneError

FILES = {
    "/tag-a/open_clip_pytorch_model.bin": b"weights of a",
    "/tag-b/open_clip_pytorch_model.bin": b"weights of b",
    f"/net-{hashlib.sha256(b'net').hexdigest()[:8]}.pth": b"net",
    f"/sam_vit_b_{hashlib.md5(b'sam').hexdigest()[:6]}.pth": b"sam",
    "/changed-0123abcd.pth": b"another file",
    "/org/model-a/resolve/main/model.bin": b"hub a",
    "/org/model-b/resolve/main/model.bin": b"hub b",
    "/org/model-c/resolve/main/model.bin": b"hub c, changed",
}
COMMIT = "c" * 40


class Server(BaseHTTPRequestHandler):
    asked: list

    def do_HEAD(self):
        self.do_GET(send=False)

    def do_GET(self, send=True):
        path = self.path.replace(COMMIT, "main")
        if send:
            type(self).asked.append(path)
        if path not in FILES:
            self.send_error(404)
            return
        data = FILES[path]
        stated = b"hub c" if path.startswith("/org/model-c") else data
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        if path.startswith("/org/"):
            self.send_header("ETag", f'"{hashlib.sha256(stated).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if send:
            self.wfile.write(data[: len(data) // 2] if "cut" in path else data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDPROBE_CACHE", str(tmp_path / "cache"))
    import huggingface_hub

    kept = partial(huggingface_hub.hf_hub_download, cache_dir=tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", kept)
    handler = type("Handler", (Server,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", handler.asked
        running.shutdown()


def test_files_of_one_name_at_two_urls_are_two_files_and_fetched_once(server):
    url, asked = server
    names = ["/tag-a/open_clip_pytorch_model.bin", "/tag-b/open_clip_pytorch_model.bin"]
    for name in names * 2:
        assert fetch(url + name, "a model").read_bytes() == FILES[name]
    assert asked == names


def test_files_of_one_name_in_two_repositories_of_a_hub_are_two_files(server):
    url, _ = server
    for name in ("/org/model-a/resolve/main/model.bin", "/org/model-b/resolve/main/model.bin"):
        for _ in range(2):
            assert fetch(url + name, "a model").read_bytes() == FILES[name]


@pytest.mark.parametrize("word", ["net", "sam"])
def test_a_hash_in_a_file_s_name_is_that_of_the_file(server, word):
    [name] = [n for n in FILES if n.startswith(f"/{word}")]
    assert fetch(server[0] + name, "a model").read_bytes() == FILES[name]


@pytest.mark.parametrize("name", ["/changed-0123abcd.pth", "/org/model-c/resolve/main/model.bin"])
def test_another_file_than_was_published_is_refused_and_not_kept(server, name, tmp_path):
    for _ in range(2):  # the second time it is fetched again
        with pytest.raises(BackboneError, match="sent another file than was published"):
            fetch(server[0] + name, "a model")
    left = [p for p in tmp_path.rglob("*") if p.is_file() and p.read_bytes() == FILES[name]]
    assert left == []


def test_a_file_that_is_not_there_says_what_to_get_from_where(server, tmp_path):
    for name in ("/missing.pth", "/org/none/resolve/main/model.bin"):
        with pytest.raises(
            BackboneError, match=rf"Get {name.split('/')[-1]} from .* --weights FILE"
        ):
            fetch(server[0] + name, "a model")
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_download_that_is_cut_off_leaves_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setitem(FILES, "/cut.pth", b"x" * 1000)
    with pytest.raises(BackboneError, match="500 of 1000 bytes"):
        fetch(server[0] + "/cut.pth", "a model")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_every_part_of_a_url_is_in_its_file_s_place():
    urls = ["https://a/b/c.bin", "https://a/d/c.bin", "https://e/b/c.bin", "https://a/b/c.bin?v=2"]
    assert len({cached(url) for url in urls}) == 4
    assert all(cached(url).name.endswith("c.bin") for url in urls)


def test_no_two_tags_of_open_clip_share_a_file():
    import open_clip

    found = [open_clip.get_pretrained_cfg(*pair) for pair in open_clip.list_pretrained()]
    urls = {one["url"] for one in found if one.get("url")}
    assert len({cached(url) for url in urls}) == len(urls) > 1
    assert download.HUB.fullmatch(
        "https://huggingface.co/laion/CLIP/resolve/main/open_clip_pytorch_model.bin"
    ).groups() == ("https://huggingface.co", "laion/CLIP", "main", "open_clip_pytorch_model.bin")
