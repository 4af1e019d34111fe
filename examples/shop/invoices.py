"""Invoices: a PDF per order, by a sync handler. Group `invoice-generation`."""

from sqlalchemy import Column, Integer, LargeBinary, MetaData, String, Table

from examples.shop.domain import OrderCreated, orders
from examples.upsert import insert_once_sync
from headwater import App, UnitOfWork

app = App("invoice-service")
metadata = MetaData()
effects = Table(
    "invoices",
    metadata,
    Column("order_id", String(64), primary_key=True),
    Column("pdf", LargeBinary, nullable=False),
    Column("amount_cents", Integer, nullable=False),
)


@app.on_start
async def create_tables() -> None:
    metadata.create_all(app.database.engine)


@app.handler(orders, group="invoice-generation")
def write_invoice(event: OrderCreated, uow: UnitOfWork) -> None:
    text = f"Invoice {event.order_id} for customer {event.customer_id}: ${event.total_cents / 100:.2f}"
    insert_once_sync(
        uow.sync_session, effects, order_id=event.order_id, pdf=one_page_pdf(text), amount_cents=event.total_cents
    )


def one_page_pdf(text: str) -> bytes:
    """The smallest PDF that shows a line of plain text."""
    escaped = text.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")
    line = f"BT /F1 12 Tf 72 720 Td ({escaped}) Tj ET".encode("latin-1", "replace")
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(line), line),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, offsets = bytearray(b"%PDF-1.4\n"), []
    for number, content in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    out += b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start)
    return bytes(out)
