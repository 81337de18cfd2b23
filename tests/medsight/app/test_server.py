"""The page's server: where it listens, and that nothing of a visitor's outlives it."""

import urllib.request
from pathlib import Path

import pytest


pytest.importorskip("gradio")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_page_starts_behind_a_proxy_and_takes_its_files_with_it(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medsight.app import launch

    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "")
    page = launch(host=host, port=0, device="cpu", block=False)
    folder, direct = Path(page.private_folder.name), urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        assert folder.is_dir() and direct.open(page.local_url, timeout=20).status == 200
    finally:
        page.close()
    assert not folder.exists()
