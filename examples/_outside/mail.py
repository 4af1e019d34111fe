"""An SMTP server that delivers to nobody, and says what it got: `python -m examples._outside.mail`."""

import argparse
from email import message_from_bytes
from typing import Any

import uvicorn
from aiosmtpd.controller import Controller
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


class Box:
    def __init__(self) -> None:
        self.mails: list[dict[str, object]] = []

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        mail = message_from_bytes(envelope.content)
        found = {"to": envelope.rcpt_tos[0], "subject": mail["Subject"], "id": mail["Message-ID"],
                 "text": str(mail.get_payload()).strip()}  # fmt: skip
        self.mails.append(found)
        return "250 OK"


def main() -> None:
    parser = argparse.ArgumentParser(description="An SMTP server that keeps what it gets.")
    parser.add_argument("--port", type=int, default=2525)
    parser.add_argument("--http-port", type=int, default=8092)
    options = parser.parse_args()
    box = Box()
    controller = Controller(box, hostname="127.0.0.1", port=options.port)
    controller.start()

    def mails(request: Request) -> JSONResponse:
        return JSONResponse(box.mails)

    web = Starlette(routes=[Route("/mails", mails)])
    uvicorn.run(web, host="127.0.0.1", port=options.http_port, log_level="error")


if __name__ == "__main__":
    main()
