"""Pushing to and pulling from a Hub, through huggingface_hub's real client, against a small one on this machine."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny import build_base

COMMIT = "c0ffee" + "0" * 34


class Hub(BaseHTTPRequestHandler):
    """The routes that creating, committing to and reading one repository take."""

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, self.headers.get("authorization")))
        if self.path == "/api/repos/create":
            self.answer(200, {"url": f"{self.server.address}/me/heads", "id": "me/heads"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self.answer(200, {"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.address}/me/heads/commit/{COMMIT}"
            self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})
        else:
            self.answer(404)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("authorization")))
        if self.path.startswith("/api/models/me/heads"):
            self.answer(200, {"id": "me/heads", "sha": COMMIT, "siblings": []})
            return
        name = self.path.split("?")[0].rpartition("/resolve/")[2].partition("/")[2]
        if not self.path.startswith("/me/heads/resolve/") or name not in self.server.files:
            self.answer(404, **{"X-Error-Code": "EntryNotFound" if "/me/heads/" in self.path else "RepoNotFound"})
            return
        content = self.server.files[name]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.answer(200, content, **{"ETag": etag, "X-Repo-Commit": COMMIT})


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.files, server.asked = {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(hub, tmp_path, code):
    """Runs code in a process whose Hub is `hub`; with `base`, a folder with a base model, and `torch` at hand."""
    base = tmp_path / "base"
    if not base.exists():
        build_base("qwen3").save_pretrained(base)
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    start = f"import torch\nfrom hf_adaptive_decode import AutoDecoForCausalLM\nbase = {str(base)!r}\n"
    return subprocess.run(
        [sys.executable, "-c", start + code], env=environment, capture_output=True, text=True, check=False
    )


PUSH = """
torch.manual_seed(0)
model = AutoDecoForCausalLM.from_base(base)
print(model.push_to_hub("me/heads", token="hf_secret", private=True))
"""


def test_a_pushed_adapter_can_be_pulled(hub, tmp_path):
    pushed = run(hub, tmp_path, PUSH)
    assert pushed.returncode == 0, pushed.stderr
    assert COMMIT in pushed.stdout
    assert set(hub.files) == {"config.json", "model.safetensors", "generation_config.json", "README.md"}
    assert all(token == "Bearer hf_secret" for path, token in hub.asked if "/api/repos" in path or "/commit/" in path)

    hub.asked.clear()
    pulled = run(
        hub,
        tmp_path,
        "torch.manual_seed(0)\n"
        "made = AutoDecoForCausalLM.from_base(base)\n"
        'model = AutoDecoForCausalLM.from_pretrained("me/heads", base_model=base, token="hf_secret")\n'
        "for name, tensor in made.decoding_adapter.state_dict().items():\n"
        "    assert torch.equal(model.decoding_adapter.state_dict()[name], tensor), name\n",
    )
    assert pulled.returncode == 0, pulled.stderr
    # Whatever moves on the branch meanwhile: the weights are asked for at the commit that the config came from.
    weights = [path for path, _ in hub.asked if "model.safetensors" in path]
    assert weights
    assert all(f"/resolve/{COMMIT}/" in path for path in weights)


def test_what_was_pulled_once_loads_offline(hub, tmp_path):
    assert run(hub, tmp_path, PUSH).returncode == 0
    load = 'AutoDecoForCausalLM.from_pretrained("me/heads", base_model=base, local_files_only={})\n'
    assert run(hub, tmp_path, load.format(False)).returncode == 0
    hub.asked.clear()
    again = run(hub, tmp_path, load.format(True))
    assert again.returncode == 0, again.stderr
    assert hub.asked == []


def test_too_large_weights_are_refused_before_they_are_downloaded(hub, tmp_path):
    assert run(hub, tmp_path, PUSH).returncode == 0
    hub.asked.clear()
    found = run(
        hub, tmp_path, 'AutoDecoForCausalLM.from_pretrained("me/heads", base_model=base, max_weight_bytes=1000)\n'
    )
    assert found.returncode == 1
    assert "AdapterLoadError" in found.stderr
    assert "1000" in found.stderr


def test_a_downloaded_adapter_cannot_name_a_local_path_as_its_base(hub, tmp_path):
    assert run(hub, tmp_path, PUSH).returncode == 0
    assert json.loads(hub.files["config.json"])["base_model_name_or_path"] == str(tmp_path / "base")
    found = run(hub, tmp_path, 'AutoDecoForCausalLM.from_pretrained("me/heads")\n')
    assert found.returncode == 1
    assert "base_model=" in found.stderr


def test_a_missing_repository_is_named(hub, tmp_path):
    found = run(hub, tmp_path, 'AutoDecoForCausalLM.from_pretrained("me/nothing", base_model=base)\n')
    assert found.returncode == 1
    assert "AdapterLoadError" in found.stderr
    assert "me/nothing" in found.stderr
