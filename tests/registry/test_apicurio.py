"""The same requests, asked of Apicurio Registry: every difference is known, with its reason, and stands in the docs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kit.apicurio import Apicurio
from tests.kit.registry import RegistryProcess, RestClient
from tests.registry.script import SCRIPT, comparable

from headwater.testing.broker import BrokerProcess

DOC = Path(__file__).parents[2] / "docs" / "reference" / "registry.md"

BACKWARD = "a registry without a config is `BACKWARD`, as Confluent's is; Apicurio's is `NONE`"
DEFAULTS = "an answer to a change has what was set; Apicurio adds its defaults"
CODE_409 = "an incompatible schema is 40901; Apicurio's code is 409"
EMPTY = "an empty schema is 42201; Apicurio answers 500"
PREFIX = "`subjectPrefix` is looked at; Apicurio gives all subjects"
VERSION = "a version that can't be one is 42202; Apicurio says that it isn't found"
UNKNOWN = "the compatibility with an unknown subject's version is 40401; Apicurio says that it is compatible"
OWN_LEVEL = "a subject without a level of its own is 40408; Apicurio gives the global one"
OTHER_TYPE = "a schema of another type is incompatible, 40901; Apicurio fails to parse it, 42201"
STATUS = "40405, 40406 and 40407 come with the status 404, as their first digits say; Apicurio's is 409"
MODE = "a subject that is `READONLY` takes nothing; Apicurio registers all the same"
MODE_CODE = "an unknown mode is 42204; Apicurio's code is 42201"
SCHEMAS = "`/schemas` names subject, version and id, and obeys `latestOnly` and `subjectPrefix`; Apicurio gives all texts alone"
CONTEXT = "the default context is `.`; Apicurio's is `:.:`"
ERRORS = "every error is JSON with a code; Apicurio's are text or nothing where no resource answers"

DIFFERENCES = {
    "global level": BACKWARD,
    "set the global level": DEFAULTS,
    "register what is incompatible": CODE_409,
    "register nothing": EMPTY,
    "subjects by prefix": PREFIX,
    "version 0": VERSION,
    "version x": VERSION,
    "check an unknown subject": UNKNOWN,
    "a subject's level": OWN_LEVEL,
    "set a subject's level": DEFAULTS,
    "full refuses": CODE_409,
    "stricter json": CODE_409,
    "other protobuf": CODE_409,
    "another type": OTHER_TYPE,
    "delete for good at once": STATUS,
    "delete it again": STATUS,
    "delete a subject for good at once": STATUS,
    "register into it": MODE,
    "set an unknown mode": MODE_CODE,
    "all schemas": SCHEMAS,
    "contexts": CONTEXT,
    "no JSON": ERRORS,
    "nonsense": ERRORS,
}


@pytest.fixture
def apicurio() -> Iterator[Apicurio]:
    registry = Apicurio()
    try:
        yield registry.start()
    finally:
        registry.stop()


class Asked:
    """A registry's answers, with its ids numbered in the order of their appearance."""

    def __init__(self, client: RestClient) -> None:
        self._client = client
        self._ids: dict[int, int] = {}

    def ask(self, method: str, path: str, body: object) -> object:
        answer = self._client.ask(method, path, body)
        return answer.status, self._numbered(comparable(answer.body), path)

    def _numbered(self, body: object, path: str) -> object:
        if isinstance(body, dict):
            return {
                name: self._number(value) if name == "id" and isinstance(value, int) else self._numbered(value, path)
                for name, value in body.items()
            }
        if isinstance(body, list):
            return [
                self._number(each) if path.endswith("referencedby") else self._numbered(each, path) for each in body
            ]
        return body

    def _number(self, id: int) -> int:
        return self._ids.setdefault(id, len(self._ids) + 1)


@pytest.mark.server
def test_every_difference_to_apicurio_is_known_and_has_a_reason(apicurio: Apicurio, tmp_path: Path) -> None:
    """Some eighty requests that build on each other: the same answers, but for those that are listed."""
    with BrokerProcess.start(tmp_path / "data") as broker, RegistryProcess.start(broker.bootstrap_servers) as registry:
        ours, theirs = Asked(registry), Asked(apicurio)
        found = {
            step.name: (mine, other)
            for step in SCRIPT
            if (mine := ours.ask(step.method, step.path, step.body))
            != (other := theirs.ask(step.method, step.path, step.body))
        }

    assert set(found) == set(DIFFERENCES), found
    doc = DOC.read_text()
    assert [reason for reason in DIFFERENCES.values() if reason[1:] not in doc] == []
