"""Opens the web page: `medsight app`."""

import signal
from functools import partial
from typing import Annotated

import typer

from medsight.cli.console import Device, Json, results
from medsight.cli.predict import Dtype, Model


def command(
    model: Model = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on: 0.0.0.0 opens the page to the network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0 for any that is free.")] = 7860,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Open a web page to ask about images, volumes and DICOM series, until it is interrupted.

    Uploads stay in a private folder of this machine and go with the visitor's session. There are no accounts: whoever
    reaches the address can use the page. Not a medical device.
    """
    from medsight.app import launch

    start = partial(launch, model, host, port, device=device, dtype=dtype, open_browser=open_browser)
    if not as_json:
        start()
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that uploads go however the page ends
    with results(as_json) as out:
        application = start(block=False)
        try:
            out.show({"url": application.local_url})
            application.block_thread()
        finally:
            application.close()
