"""A payment gateway: authorizes, captures, refunds, takes its time, and knows an idempotency key when it sees it again.

In this process, or as one of its own (`python -m examples._outside.payment --port 8090`, named by SHOP_PAYMENT_URL), which
remembers through the death of who asks it.
"""

import argparse
import asyncio
import os
from collections import Counter
from typing import Any

import httpx
import msgspec

DECLINED_TOKEN = "declined"
EXPIRES = "expires"
"""A token whose authorization can't be captured."""


class Result(msgspec.Struct, frozen=True):
    id: str | None
    decline_reason: str | None = None

    @property
    def is_successful(self) -> bool:
        return self.id is not None


class Bank:
    """What the gateway knows."""

    def __init__(self, latency_seconds: float) -> None:
        self._latency_seconds = latency_seconds
        self._answers: dict[tuple[str, str], Result] = {}
        self.asked: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        """Authorizations, captures, refunds that were made: an idempotency key counts once."""

    async def do(self, what: str, subject: str, key: str) -> Result:
        """The same key gets the same answer."""
        if self._latency_seconds and what == "authorize":
            await asyncio.sleep(self._latency_seconds)
        self.asked[what] += 1
        answer = self._answers.get((what, key))
        if answer is None:
            answer = self._answers[what, key] = self._decide(what, subject, key)
            self.done[what] += answer.is_successful
        return answer

    def _decide(self, what: str, subject: str, key: str) -> Result:
        if what == "authorize":
            if subject == DECLINED_TOKEN:
                return Result(None, "Insufficient funds")
            return Result(f"auth-{EXPIRES if subject == EXPIRES else 'ok'}-{key}")
        if what == "capture" and subject.startswith(f"auth-{EXPIRES}"):
            return Result(None, "The authorization has expired")
        return Result(f"{what}-{key}")


class PaymentGateway:
    """Asks the gateway at its address, or one of this process."""

    def __init__(self, url: str | None, latency_seconds: float = 0.0) -> None:
        self._url = url
        self._bank = Bank(latency_seconds)
        self._client: httpx.AsyncClient | None = None

    async def authorize(self, token: str, amount_cents: int, key: str) -> Result:
        return await self._ask("authorize", token, key)

    async def capture(self, authorization_id: str, amount_cents: int, key: str) -> Result:
        return await self._ask("capture", authorization_id, key)

    async def refund(self, authorization_id: str, amount_cents: int, key: str) -> Result:
        return await self._ask("refund", authorization_id, key)

    async def _ask(self, what: str, subject: str, key: str) -> Result:
        if self._url is None:
            return await self._bank.do(what, subject, key)
        if self._client is None:
            self._client = httpx.AsyncClient(base_url=self._url, timeout=10)
        response = await self._client.post(f"/{what}", json={"subject": subject}, headers={"Idempotency-Key": key})
        response.raise_for_status()
        return msgspec.json.decode(response.content, type=Result)


PAYMENT_SECONDS = float(os.environ.get("SHOP_PAYMENT_MS", "0")) / 1000
gateway = PaymentGateway(os.environ.get("SHOP_PAYMENT_URL"), PAYMENT_SECONDS)


def server(bank: Bank) -> Any:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def do(request: Request) -> JSONResponse:
        asked = await request.json()
        result = await bank.do(request.path_params["what"], asked["subject"], request.headers["Idempotency-Key"])
        return JSONResponse(msgspec.to_builtins(result))

    async def ledger(request: Request) -> JSONResponse:
        return JSONResponse({"asked": bank.asked, "done": bank.done})

    return Starlette(routes=[Route("/ledger", ledger), Route("/{what}", do, methods=["POST"])])


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(description="A payment gateway that remembers idempotency keys.")
    parser.add_argument("--port", type=int, default=8090)
    options = parser.parse_args()
    uvicorn.run(server(Bank(PAYMENT_SECONDS)), host="127.0.0.1", port=options.port, log_level="error")


if __name__ == "__main__":
    main()
