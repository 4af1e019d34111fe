"""Who sends SMS: knows an idempotency key when it sees it again, and says what it sent: `python -m examples._outside.sms`."""

import argparse

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


def main() -> None:
    parser = argparse.ArgumentParser(description="Sends no SMS, and says which.")
    parser.add_argument("--port", type=int, default=8091)
    options = parser.parse_args()
    sent: dict[str, dict[str, str]] = {}

    async def send(request: Request) -> JSONResponse:
        sent.setdefault(request.headers["Idempotency-Key"], await request.json())
        return JSONResponse({"status": "sent"})

    async def messages(request: Request) -> JSONResponse:
        return JSONResponse(list(sent.values()))

    web = Starlette(routes=[Route("/messages", messages), Route("/messages", send, methods=["POST"])])
    uvicorn.run(web, host="127.0.0.1", port=options.port, log_level="error")


if __name__ == "__main__":
    main()
