"""The page's server, asked over HTTP: what it hands out, and what it does not (docs/explore.md, "Visitors")."""

import json
import socket
from pathlib import Path
from urllib.parse import urlparse

import httpx2
import pytest
from helpers_data import make_video
from helpers_explore import turning_world

from vjepa_ac_hf.app.explorer import Limits
from vjepa_ac_hf.app.page import REQUESTS, launch, uploads_folder

UPLOAD_BYTES = 100_000


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page's address, and what it lets be played with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        clips = tmp_path_factory.mktemp("explore") / "clips"
        explorer = turning_world(clips, uploads=uploads_folder(), limits=Limits(upload_bytes=UPLOAD_BYTES))
        _, address, page = launch(explorer, host="127.0.0.1", port=None)
        yield address, explorer
        page.close()


@pytest.fixture(scope="module")
def client(served):
    # A connection of its own for every request: the server hangs up one that was idle for five seconds, which on a
    # busy machine falls into the next request.
    limits = httpx2.Limits(max_keepalive_connections=0)
    with httpx2.Client(base_url=served[0], timeout=120, limits=limits) as client:
        yield client


@pytest.fixture(scope="module")
def component(client):
    """Number of the component that the page's requests go to."""
    found = [c["id"] for c in client.get("/config").json()["components"] if c["type"] == "html"]
    assert len(found) == 1
    return found[0]


def ask(client, component, name, /, **request):
    body = {"session_hash": "s", "component_id": component, "fn_name": name, "data": request}
    return client.post("/gradio_api/component_server/", json=body)


def test_a_story_over_http(client, component):
    offered = ask(client, component, "hello").json()
    assert len(offered["clips"]) == 3 and offered["story"] is None
    token = ask(client, component, "choose", clip=1, context=2).json()["token"]
    step = ask(client, component, "act", token=token, held=["key.w"], yaw=15.0, pitch=0.0).json()["step"]
    assert step["picture"].startswith("data:image/webp;base64,") and step["action"][0] == "yaw +15.0°"
    assert "error" in ask(client, component, "act", token=token, held=["<img src=x onerror=alert(1)>"]).json()


def test_only_the_pages_requests_are_answered(client, component):
    for name in ("__init__", "postprocess", "_begin", "sessions", "answer", "get_config", ""):
        assert ask(client, component, name).status_code == 404, name
    for name in REQUESTS:
        assert ask(client, component, name).status_code == 200, name
    dependencies = client.get("/config").json()["dependencies"]
    assert dependencies == []  # nothing else can be called by Gradio's own ways
    assert client.post("/gradio_api/run/predict", json={"data": [], "fn_index": 0}).status_code >= 400


@pytest.mark.parametrize("prefix", ["/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/", "/"])
def test_no_file_is_served(client, served, tmp_path, prefix):
    """Those of the machine, of the clone, of the data set that the page shows, and of another's uploads."""
    (tmp_path / "secret.txt").write_text("secret-of-this-machine")
    root = Path(__file__).resolve().parents[1]
    files = [tmp_path / "secret.txt", root / "pyproject.toml", Path("/etc/passwd"), Path(__file__)]
    spelled = [f"{file}" for file in files] + [f"../../../../../../../..{file}" for file in files]
    spelled += [f"..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2f..{file}" for file in files]
    spelled += ["pyproject.toml", "tests/conftest.py", f"file://{files[0]}"]
    for name in spelled:
        answer = client.get(prefix + name)
        assert "secret-of-this-machine" not in answer.text and "build-backend" not in answer.text, name
        assert "root:x:0" not in answer.text and "def test_no_file" not in answer.text, name


def test_nothing_is_fetched_for_a_visitor(client):
    """Gradio's proxy is for Spaces that an app has loaded: none."""
    for target in ("http://127.0.0.1:1/", "https://huggingface.co/", "http://169.254.169.254/"):
        assert client.get(f"/gradio_api/proxy={target}").status_code >= 400
        assert client.get(f"/gradio_api/file={target}", follow_redirects=False).status_code >= 300
    assert client.get("/monitoring").status_code >= 400


def test_uploads_are_limited_and_do_not_stay(client, component, served):
    explorer = served[1]
    try:
        answer = client.post("/gradio_api/upload", files={"files": ("big.mp4", b"0" * (UPLOAD_BYTES + 1))})
        assert answer.status_code == 413 and str(UPLOAD_BYTES) in answer.text
    except httpx2.TransportError:
        pass  # it has hung up before all was sent
    assert not [file for file in explorer.uploads.rglob("*") if file.is_file() and file.stat().st_size > UPLOAD_BYTES]
    video = make_video(100)
    assert len(video) < UPLOAD_BYTES
    [path] = client.post("/gradio_api/upload", files={"files": ("<b>x.mp4", video)}).json()
    assert Path(path).is_relative_to(explorer.uploads)
    answer = ask(client, component, "drop", video=path, name="<b>x</b>.mp4", second=1, context=2).json()
    assert answer["story"]["name"] == "<b>x</b>.mp4" and "no log" in answer["story"]["note"]
    assert not [file for file in explorer.uploads.rglob("*") if file.is_file() and file.stat().st_size >= len(video)]


def test_it_listens_on_this_machine_alone(served):
    port = urlparse(served[0]).port
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
    with pytest.raises(OSError):  # another address of the loopback interface: 0.0.0.0 would answer there
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_the_page_names_no_other_machine(client):
    """What the browser would fetch: scripts, styles, fonts (og: descriptions are for those who link to it)."""
    page = client.get("/").text
    fetched = [part.split('"')[0] for word in ('src="', 'href="', "url(") for part in page.split(word)[1:]]
    assert fetched and not [url for url in fetched if url.startswith(("http", "//"))]
    assert "fonts.g" not in client.get("/theme.css").text
    config = client.get("/config").json()
    assert config["analytics_enabled"] is False and json.dumps(config).count("https://") == 0
