"""The documentation is true: its programs run, its tables are those of the code, its proofs exist."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from headwater import Event, Topic
from headwater.broker.broker_config import OWN_KEYS
from headwater.broker.dispatch import APIS
from headwater.broker.topic_config import TOPIC_KEYS
from headwater.event.codec import Decoder, encode
from headwater.event.envelope import Cause
from headwater.runtime.schemas import schemas_of
from headwater.settings import KNOWN
from tests.kit.clients import wait_until
from tests.mutants import MUTANTS

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def run_up(folder: Path, apps: list[str], expected: list[str]) -> None:
    """`headwater up` with the applications, until their output shows what is expected."""
    command = [sys.executable, "-m", "headwater", "up", "--data", str(folder / "d"), "--port", "0", "--no-registry"]
    for app in apps:
        command += ["--app", app]
    printed = folder / "out"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    with printed.open("w") as out:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, env=environment)
    try:
        wait_until(lambda: all(text in printed.read_text() for text in expected), f"{expected} in its output")
    except AssertionError:
        print(printed.read_text())
        raise
    finally:
        process.terminate()
        assert process.wait(60) == 0


@pytest.mark.server
def test_the_program_of_the_readme_runs(tmp_path: Path) -> None:
    """Copied from the page, started by the page's command."""
    (tmp_path / "hello.py").write_text(blocks("README.md", "python")[0])

    run_up(tmp_path, ["hello:app"], ["order o-1: 19.99"])


@pytest.mark.server
def test_the_tutorial_runs(tmp_path: Path) -> None:
    """Its three files, its command, its greetings."""
    events, writer, reader = blocks("docs/tutorial.md", "python")
    for name, content in (("shop_events", events), ("writer", writer), ("reader", reader)):
        (tmp_path / f"{name}.py").write_text(content)

    run_up(tmp_path, ["writer:app", "reader:app"], ["hello ada, your order o-"])


def shop_events() -> ModuleType:
    """What the pages take for granted of a team's own: events of one field or more, and their topics."""
    module = ModuleType("shop_events")
    of_orders = "OrderPlaced OrderConfirmed OrderCancelled"
    of_stock = "ReserveStock StockReserved StockRejected ReleaseStock StockReleased"
    of_payments = "ChargePayment PaymentProcessed PaymentFailed RefundPayment"
    fields = {"OrderPlaced": {"cents": int}, "ChargePayment": {"cents": int}, "OrderCancelled": {"reason": str},
              "StockReserved": {"shelf": str}, "ReleaseStock": {"shelf": str}}  # fmt: skip
    for topic, names in {
        "orders": of_orders, "stock": of_stock, "payments": of_payments, "shipping": "ShipOrder OrderShipped",
        "users": "UserRegistered",
    }.items():  # fmt: skip
        events = []
        for name in names.split():
            annotations = {"order_id": str, **fields.get(name, {})}
            events.append(type(Event)(name, (Event,), {"__annotations__": annotations, "__module__": "shop_events"}))
            setattr(module, name, events[-1])
        setattr(module, topic, Topic(f"{topic}.events.{topic}", key="order_id", events=events))
    return module


HOW_TOS = [page for page in PAGES if page.parent.name == "how-to" and blocks(str(page.relative_to(ROOT)), "python")]


@pytest.mark.parametrize("page", HOW_TOS, ids=lambda page: page.name)
def test_the_code_of_the_how_tos_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of a page after those before it: whatever it declares can be declared so."""
    monkeypatch.setitem(sys.modules, "shop_events", shop_events())
    names: dict[str, Any] = {"__name__": "how_to"}
    for block in blocks(str(page.relative_to(ROOT)), "python"):
        exec(block, names)


def test_the_classes_of_the_schemas_page_have_the_schemas_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The topic's subject, and the upcast from the page's first version to its second."""
    first, second, _ = blocks("docs/how-to/schemas.md", "python")
    names: dict[str, Any] = {}
    exec(first, names)
    (schema,) = schemas_of([names["orders"]])
    assert f"{schema.subject}.avsc" in (ROOT / "docs/how-to/schemas.md").read_text()
    exec(second, names)
    newest = names["OrderPlaced"]
    finish = Decoder([newest])
    value = encode(newest("o-1", 5), "shop", Cause("c", None)).value
    assert value is not None
    old = value.replace(b'"cents":5', b'"euros":12.5').replace(b'"eventVersion":"v2"', b'"eventVersion":"v1"')
    assert finish.decode(old).data == newest("o-1", 1250)


def test_the_apis_of_the_compatibility_page_are_those_of_the_broker() -> None:
    """Key, name and versions, all of them."""
    rows = re.findall(
        r"^\| (\d+) \| (\w+) \| (\d+)(?:-(\d+))?", (ROOT / "docs/compatibility.md").read_text(), re.MULTILINE
    )

    assert [(int(k), n, int(a), int(b or a)) for k, n, a, b in rows] == [
        (api.key, api.name, api.first_version, api.last_version) for api in APIS.values()
    ]


def test_every_config_and_setting_is_documented() -> None:
    """... and nothing that isn't there."""
    page = (ROOT / "docs/reference/broker.md").read_text()
    documented = set(re.findall(r"^\| `([a-z0-9.]+)` \|", page, re.MULTILINE))

    assert documented >= {key.name for key in OWN_KEYS} | set(TOPIC_KEYS)
    assert {name for name in documented if "." in name} <= {key.name for key in OWN_KEYS} | set(TOPIC_KEYS) | {
        "meta.properties"
    }
    settings = (ROOT / "docs/reference/settings.md").read_text()
    for name in KNOWN:
        assert f"`HEADWATER_{name}`" in settings


@pytest.mark.parametrize("page", ["docs/guarantees.md", "docs/requirements.md"])
def test_every_proof_exists(page: str) -> None:
    """A promise without a test is no promise."""
    proofs = re.findall(r"`((?:tests|examples)/[\w/]+\.py)::(\w+)`", (ROOT / page).read_text())

    assert len(proofs) > 10
    for path, name in proofs:
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path} has no {name}"


def test_every_mutant_breaks_a_line_that_is_there() -> None:
    """Once: a promise whose line was rewritten would else be without its proof until somebody runs them."""
    for mutant in MUTANTS:
        assert (ROOT / mutant.path).read_text().count(mutant.old) == 1, mutant.promise


def test_every_requirement_is_named_by_its_test() -> None:
    """The row's id stands in the docstring of the test that shows it."""
    rows = re.findall(
        r"^\| (S[\d.-]+) \| .*? \| `((?:tests|examples)/[\w/]+\.py)::",
        (ROOT / "docs/requirements.md").read_text(),
        re.MULTILINE,
    )

    for row, path in rows:
        assert row in (ROOT / path).read_text(), f"{path} does not name {row}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    """Links inside the project."""
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
