"""The notification service: an e-mail and an SMS for each booking and each cancellation. Group `notifications`.

A row says what was sent, so that an event that comes twice sends nothing. Killed between sending and the row, it sends once more,
under the same key: who sends SMS knows it and doesn't; for e-mail it is the Message-ID.
"""

import os
import smtplib
from email.message import EmailMessage
from urllib.parse import urlsplit

import httpx
from sqlalchemy import Column, MetaData, String, Table, insert, select

from examples.booking.domain import BookingCancelled, BookingCreated, bookings
from headwater import App, IdempotencyKey

app = App("notification-service")
metadata = MetaData()
notices = Table("notices", metadata, Column("key", String(400), primary_key=True))
MAIL = urlsplit(os.environ.get("BOOKING_SMTP_URL", "smtp://127.0.0.1:2525"))
SMS_URL = os.environ.get("BOOKING_SMS_URL", "http://127.0.0.1:8091")
TIMEOUT_SECONDS = 10


@app.on_start
async def create_tables() -> None:
    metadata.create_all(app.database.engine)


@app.handler(bookings, group="notifications", outside_effects=True)
def tell(event: BookingCreated | BookingCancelled, key: IdempotencyKey) -> None:
    with app.database.sessions() as session:
        if session.scalar(select(notices.c.key).where(notices.c.key == key)) is not None:
            return
    what = "confirmed" if isinstance(event, BookingCreated) else "cancelled"
    text = f"Your appointment {event.booking_id} on {event.day}, slot {event.slot}, is {what}."
    send_mail(event.email, f"Appointment {what}", text, key)
    send_sms(event.phone, text, key)
    with app.database.sessions() as session:
        session.execute(insert(notices).values(key=key))
        session.commit()


def send_mail(to: str, subject: str, text: str, key: str) -> None:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "bookings@example.com", to, subject
    message["Message-ID"] = f"<{key}@example.com>"
    message.set_content(text)
    with smtplib.SMTP(MAIL.hostname or "127.0.0.1", MAIL.port or 25, timeout=TIMEOUT_SECONDS) as server:
        server.send_message(message)


def send_sms(to: str, text: str, key: str) -> None:
    answer = httpx.post(
        f"{SMS_URL}/messages", json={"to": to, "text": text}, headers={"Idempotency-Key": key}, timeout=TIMEOUT_SECONDS
    )
    answer.raise_for_status()
