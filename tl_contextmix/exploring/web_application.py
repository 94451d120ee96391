"""What the server answers: the page with the form, questions, how far they are, and their pages."""

from __future__ import annotations

import json
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from tl_contextmix.errors import InvalidInput
from tl_contextmix.exploring.one_at_a_time import Busy, Explorer
from tl_contextmix.exploring.question_form import FORM_POLICY
from tl_contextmix.exploring.typed_questions import TypedQuestion, as_typed

# A text of a million bytes is beyond every model that can be read here.
LONGEST = 1_000_000
# The page names its own scripts, each by its hash; the frame has no origin, and no network.
_ANSWER_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'; sandbox allow-scripts"
)


def application(explorer: Explorer | None, form: str, token: str) -> Starlette:
    """Returns the application.

    Args:
        explorer: Who answers; None where the model is refused.
        form: The page with the form.
        token: First part of every path.
    """

    async def opened(_: Request) -> Response:
        return HTMLResponse(form, headers=_only(FORM_POLICY))

    routes = [Route("/", opened), *([] if explorer is None else _calls(explorer))]
    return Starlette(routes=[Mount(f"/{token}", routes=routes)])


def _calls(explorer: Explorer) -> list[Route]:
    """Returns what is asked, told and stopped."""

    async def ask(request: Request) -> Response:
        try:
            call = explorer.ask(await _question(request))
        except InvalidInput as error:
            return JSONResponse({"message": str(error)}, 422)
        except Busy:
            return JSONResponse({"message": _BUSY}, 409)
        return JSONResponse({"name": call.name}, 202)

    async def status(request: Request) -> Response:
        call = explorer.call(request.path_params["name"])
        return _gone() if call is None else JSONResponse(call.status())

    async def stop(request: Request) -> Response:
        explorer.stop(request.path_params["name"])
        return Response(status_code=204)

    async def page(request: Request) -> Response:
        call = explorer.call(request.path_params["name"])
        if call is None or not call.html:
            return _gone()
        return HTMLResponse(call.html, headers=_only(_ANSWER_POLICY))

    return [
        Route("/calls", ask, methods=["POST"]),
        Route("/calls/{name}", status),
        Route("/calls/{name}/stop", stop, methods=["POST"]),
        Route("/calls/{name}/page", page),
    ]


_BUSY = "The model answers another question, of another window perhaps. Ask again when it is done."


def _gone() -> Response:
    return PlainTextResponse("There is no such answer any more: ask again.\n", 404)


def _only(policy: str) -> dict[str, str]:
    return {"content-security-policy": policy}


async def _question(request: Request) -> TypedQuestion:
    """Returns the question in the body of a request.

    Raises:
        InvalidInput: If there is none.
    """
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > LONGEST:
                raise InvalidInput(
                    "the text is too long", f"over {LONGEST:,} bytes", "fewer", "Shorten it."
                )
        given: Any = json.loads(bytes(body))
    except (ClientDisconnect, ValueError, RecursionError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(
            "this is no question", "no JSON", "what the page sends", "Reload it."
        ) from error
    return as_typed(given)
