"""Starts the page: on this machine alone unless told otherwise, with nothing fetched from or sent to anywhere."""

import os
import signal
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any

import gradio as gr

from medsight.inference.predictor import Predictor

from .page import build


MAX_FILE_SIZE = "1gb"
STYLE = Path(__file__).with_name("page.css")
# Nothing of a visitor's leaves this process, and the page has no more on it than ours.
PRIVATE = {
    "share": False,
    "footer_links": [],
    "run_history": False,
    "enable_monitoring": False,
    "mcp_server": False,
    "ssr_mode": False,
}


def launch(
    model: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str = "auto",
    dtype: str = "auto",
    open_browser: bool = False,
    block: bool = True,
) -> Any:
    """Loads a checkpoint and serves the page, until interrupted.

    Uploaded files lie in a folder of this process that only its user can read, are deleted with the visitor's session
    (an hour after its page was closed), and all of them when this stops. There are no accounts: whoever reaches the
    address can use the page.

    Args:
        model, device, dtype: as `Predictor` takes them.
        host: address to listen on: "127.0.0.1" for this machine alone, "0.0.0.0" for the network.
        port: 0 for any that is free.
        open_browser: open the page in the default browser.
        block: `False` returns at once; close the returned application to stop.

    Returns:
        The running Gradio application; `local_url` is its address.

    Raises:
        OSError: the checkpoint is missing, or the port is taken.
        ValueError: the checkpoint is bad.
    """
    host = host.strip("[]")
    if port:
        _check_port(host, port)
    if block:
        _stop_on_termination()
    folder = tempfile.TemporaryDirectory(prefix="medsight-app-")
    uploads, sessions = Path(folder.name, "uploads"), Path(folder.name, "sessions")
    for path in (uploads, sessions):
        path.mkdir()
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    blocks = build(Predictor(model, device=device, dtype=dtype), sessions)
    blocks.queue(max_size=32, default_concurrency_limit=4)
    blocks.private_folder = folder  # lives as long as the application does, and is removed with it
    close = blocks.close

    def close_and_clean(*args: Any, **kwargs: Any) -> None:
        close(*args, **kwargs)
        folder.cleanup()

    blocks.close = close_and_clean
    _need_no_proxy(host)
    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Base(
        primary_hue="teal", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "monospace"]
    )
    try:
        blocks.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port or None,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=MAX_FILE_SIZE,
            theme=theme,
            css_paths=STYLE,
            **PRIVATE,
        )
        print(f"MedSIGHT is at {blocks.local_url} (Ctrl+C stops it)", flush=True)
        if block:
            blocks.block_thread()
    finally:
        if block:
            blocks.close()
    return blocks


def _stop_on_termination() -> None:
    """`kill`, a container's stop and a lost terminal end the page as Ctrl+C does, so that uploads are deleted."""
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            if hasattr(signal, name):  # Windows has no SIGHUP
                signal.signal(getattr(signal, name), signal.default_int_handler)


def _need_no_proxy(host: str) -> None:
    """gradio asks its own server whether it is up, which no proxy can answer."""
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), host, "localhost", "127.0.0.1", "::1")))


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(f"cannot listen on {host}, port {port} ({error.strerror}): name another port") from error
