"""The Space's files: they agree with the project, and start the page beside nothing but the packages."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[3]


def test_its_requirements_are_the_projects_own() -> None:
    setup = (ROOT / "setup.py").read_text("utf-8")
    lines = (ROOT / "space" / "requirements.txt").read_text("utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith(("#", "--"))]
    assert len(wanted) > 8 and [line for line in wanted if f'"{line}"' not in setup] == []
    runtime = re.search(r"runtime = \[(.*?)\]", setup, re.DOTALL)
    assert runtime is not None and set(re.findall(r'"([^"]+)"', runtime[1])) <= set(wanted)


def test_its_card_names_the_app_and_a_gradio_that_the_requirements_allow() -> None:
    card = (ROOT / "space" / "README.md").read_text("utf-8")
    header = dict(line.split(": ", 1) for line in card.split("---")[1].strip().splitlines())
    assert (ROOT / "space" / header["app_file"]).is_file() and header["sdk"] == "gradio"
    assert header["sdk_version"].startswith("6.") and "Not a medical device" in card
    assert len(header["short_description"]) <= 60  # what the Hub takes


@pytest.mark.slow
def test_it_starts_beside_the_packages_alone_and_takes_its_files_away_when_it_is_stopped(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    space, temporary = tmp_path / "space", tmp_path / "temporary"
    temporary.mkdir()
    shutil.copytree(ROOT / "space", space)
    for name in ("configuration_medsight", "modeling_medsight", "processing_medsight", "medsight"):
        shutil.copytree(ROOT / name, space / name, ignore=shutil.ignore_patterns("__pycache__"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=space, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline, page = time.monotonic() + 120, None
        while page is None and process.poll() is None and time.monotonic() < deadline:
            try:
                page = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10).read().decode()
            except OSError:
                time.sleep(0.5)
        assert page is not None, process.communicate(timeout=10)[1]
        assert re.search(r'"title": ?"MedSIGHT"', page)
        (private,) = temporary.glob("medsight-app-*")
        assert private.stat().st_mode & 0o077 == 0
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        assert list(temporary.glob("medsight-app-*")) == []
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
