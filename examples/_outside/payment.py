"""A payment service: authorizes, declines, takes its time, and knows an idempotency key when it sees it again."""

import asyncio
from typing import NamedTuple

DECLINED_TOKEN = "declined"


class PaymentResult(NamedTuple):
    authorization_id: str | None
    decline_reason: str | None

    @property
    def is_successful(self) -> bool:
        return self.authorization_id is not None


class PaymentGateway:
    def __init__(self, latency_seconds: float = 0.0) -> None:
        self._latency_seconds = latency_seconds
        self._answers: dict[str, PaymentResult] = {}
        self.charges = 0
        """Authorizations that were made: an idempotency key counts once."""

    async def authorize(self, token: str, amount_cents: int, idempotency_key: str) -> PaymentResult:
        """The same key gets the same answer, and is charged once."""
        if self._latency_seconds:
            await asyncio.sleep(self._latency_seconds)
        answer = self._answers.get(idempotency_key)
        if answer is None:
            if token == DECLINED_TOKEN:
                answer = PaymentResult(None, "Insufficient funds")
            else:
                self.charges += 1
                answer = PaymentResult(f"auth-{idempotency_key}", None)
            self._answers[idempotency_key] = answer
        return answer
