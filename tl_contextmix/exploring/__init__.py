"""A page on this machine where one types a text and sees what a model makes of it.

Needs ``pip install "tl-contextmix[explore]"``.
"""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_contextmix.adapters.loading import load_model
from tl_contextmix.errors import ContextMixError, InvalidInput, UnsupportedModel
from tl_contextmix.exploring import question_form
from tl_contextmix.exploring.limits import MAX_GIB, Limits
from tl_contextmix.exploring.one_at_a_time import Explorer
from tl_contextmix.exploring.request_guard import Guard

if TYPE_CHECKING:
    from uvicorn import Server

HOST = "127.0.0.1"


def explore(
    model: Any,
    *,
    host: str = HOST,
    port: int = 0,
    browser: bool = True,
    max_flops: float | None = None,
    max_gib: float = MAX_GIB,
    loading: dict[str, Any] | None = None,
    ready: Callable[[str], object] = lambda address: None,
) -> None:
    """Serves a page to explore a model with, until it is interrupted.

    One types a text, a target and a foil, picks sections of `report` or single methods, and gets
    the same linked panels. Only this machine can open it, at an address with a random token; pages
    fetch nothing from elsewhere, and what is typed is written nowhere. One question is answered at
    a time; another one is told to wait.

    Args:
        model: The model, or what `load_model` takes. One that is refused gets a page that says why.
        host: An address of this machine that no other can reach.
        port: 0: one that is free.
        browser: Whether the page is opened.
        max_flops: Operations that a question may take, by `estimate`; None: 1e13, and 1e15 where
            the model is not on the processor.
        max_gib: Memory that it may take beside the weights, in 2^30 bytes.
        loading: Options of `load_model`.
        ready: Called with the address.

    Raises:
        ContextMixError: If there is no such model, the address cannot be used, or starlette and
            uvicorn are not installed.
    """
    _require_server()
    with listening(host, port) as (listener, hosts):
        token = secrets.token_urlsafe(24)
        try:
            if isinstance(model, (str, Path)):
                model = load_model(model, **(loading or {}))
            form = question_form.form(model)
            explorer = Explorer(model, Limits(model, max_flops, max_gib))
        except UnsupportedModel as error:
            form, explorer = question_form.refused(str(error)), None
        address = f"http://{hosts[0]}/{token}/"
        with _opened(address) if browser else contextlib.nullcontext():
            ready(address)
            try:
                # Interrupting it is how it ends.
                with contextlib.suppress(KeyboardInterrupt):
                    server(explorer, form, token, hosts).run(sockets=[listener])
            finally:
                if explorer is not None:
                    explorer.close()


def server(explorer: Explorer | None, form: str, token: str, hosts: Sequence[str]) -> Server:
    """Returns the server, which answers once it runs; see `application` and `Guard`."""
    import uvicorn

    from tl_contextmix.exploring.web_application import application

    guarded: Any = Guard(application(explorer, form, token), token, hosts)
    settings = uvicorn.Config(
        guarded,
        access_log=False,  # addresses hold the token
        log_level="warning",
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(settings)


def _require_server() -> None:
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ContextMixError(
            f"the page needs the package {missing[0]}",
            "none installed",
            "starlette and uvicorn",
            'Install them: pip install "tl-contextmix[explore]".',
        )


@contextmanager
def listening(host: str, port: int) -> Iterator[tuple[socket.socket, list[str]]]:
    """Listens on an address that only this machine reaches, and yields its names, with the port."""
    number = "127.0.0.1" if host == "localhost" else host
    try:
        inside = ipaddress.ip_address(number).is_loopback
    except ValueError:
        inside = False
    if not inside:
        raise InvalidInput(
            "the page is for this machine alone",
            f"the host {host!r}",
            "127.0.0.1, ::1 or localhost",
            "To reach it from another machine, forward the port: ssh -L.",
        )
    family = socket.AF_INET6 if ":" in number else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((number, port))
        except (OSError, OverflowError) as error:
            seen = getattr(error, "strerror", None) or error
            raise InvalidInput(
                f"cannot listen on port {port} of {host}", seen, "a free port", "Leave it out."
            ) from error
        listener.listen()
        found = listener.getsockname()[1]
        shown = f"[{number}]" if ":" in number else number
        yield listener, [f"{shown}:{found}", f"localhost:{found}"]


@contextmanager
def _opened(address: str) -> Iterator[None]:
    """Opens an address in the browser, by a file: others may read the arguments of a program."""
    with tempfile.TemporaryDirectory(prefix="tl_contextmix-") as folder:
        path = Path(folder) / "open.html"
        path.touch(mode=0o600)
        path.write_text(f'<meta http-equiv="refresh" content="0; url={escape(address)}">')
        # In a thread: some browsers of terminals return when they are left.
        threading.Thread(target=webbrowser.open, args=(path.as_uri(),), daemon=True).start()
        yield
