"""The process that serves: a socket, uvicorn, signals.

    python -m mamba2lm.inference.server checkpoint=runs/quickstart

``docs/serving.md`` says what it answers; the endpoints are in ``app.py``.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from mamba2lm.cli import fail, script
from mamba2lm.inference.config import ServeConfig
from mamba2lm.schema import ConfigError

try:
    import uvicorn

    from mamba2lm.inference.answers import LAST_WORDS
    from mamba2lm.inference.app import Server
except ImportError as error:
    if __name__ == "__main__":
        fail(
            f"the server needs the packages of the extra 'serve' ({error}); "
            "install them with pip install 'mamba2lm[serve]'."
        )
    raise

from mamba2lm.inference.engine import Engine
from mamba2lm.inference.loading import load_run

log = logging.getLogger("mamba2lm.inference.server")  # also where it runs as __main__

SWITCH_SECONDS = 5e-5
"""After which a thread that waits for the interpreter gets it. The engine's gives it away in every
operation of PyTorch, and while answers are written waits so long after each."""


class UvicornServer(uvicorn.Server):
    """Uvicorn that tells the application when it is to drain."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self.server = server

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Take SIGTERM or SIGINT: finish what runs, refuse what is new."""
        self.server.drain()
        super().handle_exit(sig, frame)


def listen(config: ServeConfig) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigError: The address cannot be had.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # Asyncio switches Nagle's delays off for sockets that say they are TCP.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((config.host, config.port))
        sock.listen(2048)
        return sock
    except OSError as error:
        sock.close()
        unknown = isinstance(error, socket.gaierror)
        key, value = ("host", config.host) if unknown else ("port", config.port)
        raise ConfigError(key, value, f"cannot be listened on: {error.strerror}.") from error


def http_server(config: ServeConfig, engine: Engine, model_name: str) -> UvicornServer:
    """Return a server that answers on whatever sockets it is run with.

    Raises:
        ConfigError: The chat template is none.
    """
    server = Server(config, engine, model_name)
    settings = uvicorn.Config(
        server.app(),
        http="h11",
        loop="asyncio",
        log_config=None,
        access_log=False,
        # Answers that are cut short by the drain still have to be written.
        timeout_graceful_shutdown=int(config.drain_timeout) + LAST_WORDS,
        timeout_keep_alive=30,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
    )
    return UvicornServer(settings, server)


def settle() -> None:
    """Make the interpreter fit for two threads that must not wait for each other.

    What is there by now stays: a search for garbage among all of it, with PyTorch half a million
    objects, would hold both threads for a fifth of a second again and again.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()


def serve(config: ServeConfig, engine: Engine, model_name: str) -> None:
    """Serve until SIGTERM or Ctrl-C, then let what runs end.

    Raises:
        ConfigError: The address cannot be had, or the chat template is none.
    """
    http = http_server(config, engine, model_name)
    with listen(config) as sock:
        host, port = sock.getsockname()[:2]
        if not http.server.has_key and not host.startswith("127.") and host != "::1":
            log.warning("anyone who reaches %s can use this server: no api_key is set", host)
        shown = f"[{host}]" if ":" in host else host
        log.info("serving %s on http://%s:%d", model_name, shown, port)
        # Uvicorn raises the signals that ended it once more when it is done.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        settle()
        http.run(sockets=[sock])


@script("serve", ServeConfig)
def main(config: ServeConfig) -> None:
    """Load the model and serve it."""
    config.validate()
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError(
            "WORLD_SIZE",
            processes,
            "a server is one process; start it without torchrun, one for each GPU.",
        )
    began = time.perf_counter()
    run = load_run(config.checkpoint, device=config.device, dtype=config.dtype)
    if run.tokenizer is None:
        raise ConfigError(
            "checkpoint",
            config.checkpoint,
            "the model was trained without a tokenizer, on a synthetic task; "
            "serving needs one trained on text.",
        )
    engine = Engine(
        run.model,
        run.tokenizer,
        prefill_chunk=config.prefill_chunk,
        max_rows=config.max_rows,
        state_dtype=config.state_dtype,
        state_cache_bytes=config.state_cache_mib << 20,
    )
    log.info("the model is on %s (%.1f s)", engine.device, time.perf_counter() - began)
    if config.warm_up and engine.device.type == "cuda":
        engine.warm_up()
    folder = Path(config.checkpoint).resolve()
    serve(config, engine, config.model_name or folder.name)


if __name__ == "__main__":
    main()
