"""The registry as its clients see it: over HTTP, with confluent-kafka's serializers, on both engines."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONDeserializer, JSONSerializer
from confluent_kafka.schema_registry.protobuf import ProtobufDeserializer, ProtobufSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tests.kit.clients import wait_until
from tests.kit.commands import commands
from tests.kit.kafka import KafkaCluster, make_archive
from tests.kit.registry import Answer, RegistryProcess, RestClient, body_of
from typer.testing import CliRunner

from headwater.schema.schema import MAX_BYTES
from headwater.testing.broker import BrokerProcess

pytestmark = pytest.mark.server

ID = {"name": "id", "type": "int"}
NOTE = {"name": "note", "type": ["null", "string"], "default": None}


def user(*fields: object) -> dict[str, object]:
    return {"type": "record", "name": "User", "fields": list(fields)}


@pytest.fixture(scope="module", params=["embedded", "kafka"])
def servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A broker of this module's own: a registry has all of `_schemas`."""
    if request.param == "embedded":
        with BrokerProcess.start(tmp_path_factory.mktemp("registry") / "data") as broker:
            yield broker.bootstrap_servers
        return
    make_archive()
    cluster = KafkaCluster().start()
    yield cluster.bootstrap_servers
    cluster.stop()


@pytest.fixture(scope="module")
def registry(servers: str) -> Iterator[RegistryProcess]:
    with RegistryProcess.start(servers) as process:
        yield process


def test_versions_are_registered_looked_up_and_deleted(registry: RegistryProcess, unique: str) -> None:
    """Subjects, versions, ids, lookup, soft and hard delete, with Confluent's answers and codes. (both engines)"""
    ask, subject = registry.ask, f"{unique}-value"
    first = registry.register(subject, user(ID))
    assert first.status == 200
    id = first.body["id"]
    assert registry.register(subject, user(ID)).body == {"id": id}, "the same schema again"
    assert registry.register(f"{unique}-other", user(ID)).body == {"id": id}, "the same schema elsewhere"
    second = registry.register(subject, user(ID, NOTE)).body["id"]
    assert second > id
    assert ask("GET", f"/subjects/{subject}/versions").body == [1, 2]
    latest = ask("GET", f"/subjects/{subject}/versions/latest").body
    assert (latest["subject"], latest["version"], latest["id"]) == (subject, 2, second)
    assert ask("GET", f"/subjects/{subject}/versions/-1").body == latest
    assert json.loads(ask("GET", f"/schemas/ids/{id}").body["schema"]) == user(ID)
    assert json.loads(ask("GET", f"/schemas/ids/{second}?fetchMaxId=true").body["schema"]) == user(ID, NOTE)
    assert ask("GET", f"/schemas/ids/{id}/versions").body == [
        {"subject": f"{unique}-other", "version": 1}, {"subject": subject, "version": 1},
    ]  # fmt: skip
    assert ask("POST", f"/subjects/{subject}", body_of(user(ID))).body["version"] == 1
    assert ask("POST", f"/subjects/{subject}", body_of(user(NOTE))).code == 40403
    assert ask("POST", f"/subjects/{unique}-none", body_of(user(ID))).code == 40401
    assert ask("DELETE", f"/subjects/{subject}/versions/1?permanent=true").code == 40407
    assert ask("DELETE", f"/subjects/{subject}/versions/1").body == 1
    assert ask("DELETE", f"/subjects/{subject}/versions/1").code == 40406
    assert ask("GET", f"/subjects/{subject}/versions").body == [2]
    assert ask("GET", f"/subjects/{subject}/versions?deleted=true").body == [1, 2]
    assert ask("DELETE", f"/subjects/{subject}/versions/1?permanent=true").body == 1
    assert ask("DELETE", f"/subjects/{subject}?permanent=true").code == 40405
    assert ask("DELETE", f"/subjects/{subject}").body == [2]
    assert ask("DELETE", f"/subjects/{subject}").code == 40404
    assert subject not in ask("GET", "/subjects").body
    assert subject in ask("GET", "/subjects?deleted=true").body
    assert registry.register(subject, user(NOTE)).status == 200
    assert ask("GET", f"/subjects/{subject}/versions").body == [3], "a version is never given twice"


def test_an_incompatible_schema_is_refused_with_the_field(registry: RegistryProcess, unique: str) -> None:
    """S001.18, S004.10: a new subject is BACKWARD: deleting a field passes, a new one without a default is a 409 that
    names it; FORWARD, FULL, NONE and the transitive levels as they say. (both engines)"""
    ask, required = registry.ask, {"name": "mail", "type": "string"}
    assert ask("GET", "/config").body == {"compatibilityLevel": "BACKWARD"}
    registry.register(unique, user(ID, NOTE))
    refused = registry.register(unique, user(ID, NOTE, required))
    assert (refused.status, refused.code) == (409, 40901)
    assert "'mail'" in refused.body["message"]
    assert registry.register(unique, user(ID)).status == 200

    def verdict(level: str, schema: object) -> bool:
        ask("PUT", f"/config/{unique}", {"compatibility": level})
        answer = ask("POST", f"/compatibility/subjects/{unique}/versions?verbose=true", body_of(schema)).body
        assert answer["is_compatible"] is (answer["messages"] == [])
        return bool(answer["is_compatible"])

    more = user(ID, {"name": "note", "type": "string", "default": ""})
    assert [verdict(level, user(ID, required)) for level in ("NONE", "FORWARD", "BACKWARD", "FULL")] == [
        True, True, False, False,
    ]  # fmt: skip
    assert verdict("BACKWARD", more)
    assert not verdict("BACKWARD_TRANSITIVE", more), "version 1 wrote nulls"
    assert ask("GET", f"/config/{unique}").body == {"compatibilityLevel": "BACKWARD_TRANSITIVE"}
    assert ask("DELETE", f"/config/{unique}").body == {"compatibilityLevel": "BACKWARD_TRANSITIVE"}
    assert ask("GET", f"/config/{unique}").code == 40408
    assert ask("GET", f"/config/{unique}?defaultToGlobal=true").body == {"compatibilityLevel": "BACKWARD"}


def test_a_ci_job_fails_on_an_incompatible_change_and_names_the_field(
    registry: RegistryProcess, unique: str, tmp_path: Path
) -> None:
    """S001.18, S004.10: `headwater schemas check` exits with 1 and names the field; 0 for what may follow. (both engines)"""
    file = tmp_path / "user.avsc"

    def run(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(commands, ["schemas", *arguments, "--registry", registry.url])
        assert done.exit_code == code, done.output
        return done.output

    file.write_text(json.dumps(user(ID)))
    assert "is new" in run("check", unique, str(file))
    run("register", unique, str(file))
    file.write_text(json.dumps(user(ID, {"name": "mail", "type": "string"})))
    assert "'mail'" in run("check", unique, str(file), code=1)
    assert "'mail'" in run("register", unique, str(file), code=1)
    assert json.loads(run("check", unique, str(file), "--json", code=1))["compatible"] is False
    file.write_text(json.dumps(user(ID, NOTE)))
    assert "may follow version 1" in run("check", unique, str(file))
    assert unique in {row["subject"] for row in json.loads(run("list", "--json"))}
    assert json.loads(run("show", unique)) == user(ID)
    file.write_text("{")
    assert "Invalid schema" in run("check", unique, str(file), code=1)
    assert "can't be read" in run("check", unique, str(tmp_path / "none.avsc"), code=1)


def test_references_hold_what_they_need(registry: RegistryProcess, unique: str) -> None:
    """Schemas of the three formats that build on others; what is referenced can't be deleted. (both engines)"""
    ask = registry.ask
    registry.register(f"{unique}-a", user(ID))
    avro = {"type": "record", "name": "Order", "fields": [{"name": "by", "type": "User"}]}
    reference = [{"name": "User", "subject": f"{unique}-a", "version": 1}]
    id = registry.register(f"{unique}-o", avro, references=reference).body["id"]
    assert ask("GET", f"/schemas/ids/{id}").body["references"] == reference
    assert ask("GET", f"/subjects/{unique}-a/versions/1/referencedby").body == [id]
    assert ask("DELETE", f"/subjects/{unique}-a/versions/1").code == 42206
    assert registry.register(f"{unique}-p", avro).code == 42201

    registry.register(f"{unique}-pa", 'syntax = "proto3"; message Line { int32 a = 1; }', "PROTOBUF")
    proto = 'syntax = "proto3"; import "line.proto"; message Order { Line line = 1; }'
    reference = [{"name": "line.proto", "subject": f"{unique}-pa", "version": 1}]
    assert registry.register(f"{unique}-po", proto, "PROTOBUF", references=reference).status == 200

    registry.register(f"{unique}-ja", {"type": "integer"}, "JSON")
    reference = [{"name": "n.json", "subject": f"{unique}-ja", "version": 1}]
    schema = {"type": "object", "properties": {"n": {"$ref": "n.json"}}, "additionalProperties": False}
    assert registry.register(f"{unique}-jo", schema, "JSON", references=reference).status == 200
    changed = {**schema, "properties": {"n": {"type": "string"}}}
    assert registry.register(f"{unique}-jo", changed, "JSON").code == 40901


def test_modes_metadata_rules_contexts_and_aliases(registry: RegistryProcess, unique: str) -> None:
    """READONLY, IMPORT with ids and versions, data contracts stored and returned, contexts with ids of their own, an alias.
    (both engines)"""
    ask = registry.ask
    assert ask("PUT", f"/mode/{unique}", {"mode": "READONLY"}).body == {"mode": "READONLY"}
    assert registry.register(unique, user(ID)).code == 42205
    assert ask("PUT", f"/mode/{unique}", {"mode": "IMPORT"}).status == 200
    assert registry.register(unique, user(ID), id=70_000, version=7).body == {"id": 70_000}
    assert registry.register(unique, user(NOTE), id=70_000, version=8).code == 42207
    assert ask("GET", f"/subjects/{unique}/versions").body == [7]
    assert ask("DELETE", f"/mode/{unique}").body == {"mode": "IMPORT"}
    assert registry.register(unique, user(NOTE), id=9).code == 42205

    contract = {
        "metadata": {"tags": {"**.mail": ["PII"]}, "properties": {"owner": "shop"}, "sensitive": ["s"]},
        "ruleSet": {
            "domainRules": [{"name": "r", "kind": "CONDITION", "mode": "WRITE", "type": "CEL", "expr": "true"}]
        },
    }
    subject = f"{unique}-contract"
    id = registry.register(subject, user(ID), **contract).body["id"]
    found = ask("GET", f"/schemas/ids/{id}").body
    assert {name: found[name] for name in contract} == contract
    assert ask("GET", f"/subjects/{subject}/metadata?key=owner&value=shop").body["id"] == id
    assert ask("GET", f"/subjects/{subject}/metadata?key=owner&value=x").code == 40403

    assert registry.register(f":.{unique}:s", user(ID, NOTE)).body == {"id": 1}
    assert f".{unique}" in ask("GET", "/contexts").body
    assert ask("GET", f"/subjects?subjectPrefix=:.{unique}:").body == [f":.{unique}:s"]
    assert json.loads(ask("GET", f"/schemas/ids/1?subject=:.{unique}:s").body["schema"]) == user(ID, NOTE)

    context = f":.{unique}-context:"
    assert registry.register(f"{context}s", user(ID)).status == 200
    assert ask("PUT", f"/mode/{context}", {"mode": "IMPORT"}).code == 42205  # it has schemas
    assert ask("PUT", f"/mode/{context}", {"mode": "READONLY"}).status == 200
    assert registry.register(f"{context}s", user(ID, NOTE)).code == 42205
    assert registry.register(f"{unique}-elsewhere", user(ID, NOTE)).status == 200
    assert ask("DELETE", f"/mode/{context}").status == 200
    assert ask("PUT", f"/config/{context}", {"compatibility": "NONE"}).status == 200
    assert ask("GET", f"/config/{context}s?defaultToGlobal=true").body["compatibilityLevel"] == "NONE"
    assert registry.register(f"{context}s", user({"name": "other", "type": "int"})).status == 200

    ask("PUT", f"/config/{unique}-alias", {"alias": subject})
    assert ask("GET", f"/subjects/{unique}-alias/versions/1").body["id"] == id


@pytest.mark.parametrize("whole", [True, False], ids=["the subject", "its last version"])
def test_settings_go_with_what_is_deleted(registry: RegistryProcess, unique: str, whole: bool) -> None:
    """A subject that is deleted, softly too, or by its last version, has no level and no mode of its own any more. (both
    engines)"""
    registry.register(unique, user(ID))
    registry.register(unique, user(ID, NOTE))
    assert registry.ask("PUT", f"/config/{unique}", {"compatibility": "NONE"}).status == 200
    if whole:
        assert registry.ask("DELETE", f"/subjects/{unique}").body == [1, 2]
    else:
        assert registry.ask("DELETE", f"/subjects/{unique}/versions/1").body == 1
        assert registry.ask("GET", f"/config/{unique}").status == 200
        assert registry.ask("DELETE", f"/subjects/{unique}/versions/2").body == 2
    assert registry.ask("GET", f"/config/{unique}").code == 40408


def test_settings_that_are_put_at_once_are_all_kept(registry: RegistryProcess, unique: str) -> None:
    """Each says one thing of a subject, and all are answered: none takes another one's back. (both engines)"""
    for turn in range(10):
        subject = f"{unique}-{turn}"
        bodies = [{"compatibility": "FULL"}, {"normalize": True}, {"compatibilityGroup": "major"}]
        threads = [threading.Thread(target=registry.ask, args=("PUT", f"/config/{subject}", body)) for body in bodies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = registry.ask("GET", f"/config/{subject}").body
        assert found == {"compatibilityLevel": "FULL", "normalize": True, "compatibilityGroup": "major"}


def test_what_is_forwarded_keeps_what_its_client_lets_through(
    registry: RegistryProcess, servers: str, unique: str
) -> None:
    """A registry that doesn't write sends on the header that lets unknown properties through. (both engines)"""
    body = {**body_of(user(ID)), "future": True}
    headers = {"Confluent-Accept-Unknown-Properties": "true"}
    with RegistryProcess.start(servers) as other:
        for i, each in enumerate((registry, other)):
            wait_until(
                lambda each=each, i=i: (
                    each.ask("POST", f"/subjects/{unique}-{i}/versions", body, headers).status == 200
                ),  # type: ignore[misc]
                "somebody to write",
            )
            assert each.ask("POST", f"/subjects/{unique}-{i}/versions", body).status == 422


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/subjects/bad/versions", b"{", 400, 400),
        ("POST", "/subjects/bad/versions", b"[" * 100_000, 422, 422),
        ("POST", "/subjects/bad/versions", {"nonsense": 1}, 422, 422),
        ("POST", "/subjects/bad/versions", {"schema": "{"}, 422, 42201),
        ("POST", "/subjects/bad/versions", {"schema": ""}, 422, 42201),
        ("POST", "/subjects/bad/versions", {"schema": '"int"', "schemaType": "XML"}, 422, 42201),
        ("POST", "/subjects/bad/versions", {"schema": "x" * (MAX_BYTES + 1)}, 422, 42209),
        ("POST", "/subjects/bad/versions", {"schema": '"int"', "references": [{"name": "a", "subject": "none", "version": 1}]},
         422, 42201),
        ("POST", "/subjects/bad%00/versions", {"schema": '"int"'}, 422, 42208),
        ("GET", "/subjects/none/versions/latest", None, 404, 40401),
        ("GET", "/subjects/none/versions/0", None, 422, 42202),
        ("GET", "/subjects/none/versions/x", None, 422, 42202),
        ("GET", "/schemas/ids/999999", None, 404, 40403),
        ("GET", "/schemas/ids/x", None, 404, 404),
        ("GET", "/nonsense", None, 404, 404),
        ("PATCH", "/config", {}, 405, 405),
        ("PUT", "/config", {"compatibility": "SIDEWAYS"}, 422, 42203),
        ("PUT", "/mode", {"mode": "SLEEPY"}, 422, 42204),
        ("DELETE", "/subjects/none", None, 404, 40401),
    ],
)  # fmt: skip
def test_bad_requests_get_the_code_that_says_why(
    registry: RegistryProcess, method: str, path: str, body: object, status: int, code: int
) -> None:
    """Invalid, oversized, recursive, unknown: an answer with what is wrong, and the registry goes on. (both engines)"""
    answer = registry.ask(method, path, body)

    assert (answer.status, answer.code) == (status, code)
    assert registry.ask("GET", "/subjects").status == 200


def test_unknown_properties_are_let_through_when_the_client_says_so(registry: RegistryProcess, unique: str) -> None:
    body = {**body_of(user(ID)), "future": True}

    assert registry.ask("POST", f"/subjects/{unique}/versions", body).status == 422
    headers = {"Confluent-Accept-Unknown-Properties": "true"}
    assert registry.ask("POST", f"/subjects/{unique}/versions", body, headers).status == 200


def proto_message() -> type:
    file = descriptor_pb2.FileDescriptorProto(name="user.proto", package="t", syntax="proto3")
    message = file.message_type.add(name="User")
    message.field.add(name="id", number=1, type=5, label=1)
    message.field.add(name="name", number=2, type=9, label=1)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.User"))


@pytest.mark.parametrize("kind", ["AVRO", "JSON", "PROTOBUF"])
def test_confluent_serializers_work_in_all_formats(
    registry: RegistryProcess, servers: str, unique: str, kind: str
) -> None:
    """What one client's serializer wrote another one's deserializer reads, through a topic. (both engines)"""
    writer, reader = (SchemaRegistryClient({"url": registry.url}) for _ in range(2))
    value: object = {"id": 7, "name": "x"}
    if kind == "AVRO":
        text = json.dumps(user(ID, {"name": "name", "type": "string"}))
        serialize, deserialize = AvroSerializer(writer, text), AvroDeserializer(reader)
    elif kind == "JSON":
        text = json.dumps({"title": "User", "type": "object", "properties": {"id": {"type": "integer"}}})
        serialize, deserialize = JSONSerializer(text, writer), JSONDeserializer(None, schema_registry_client=reader)
    else:
        message = proto_message()
        value = message(id=7, name="x")
        settings = {"use.deprecated.format": False}
        serialize = ProtobufSerializer(message, writer, settings)
        deserialize = ProtobufDeserializer(message, settings, reader)
    context = SerializationContext(unique, MessageField.VALUE)
    producer = Producer({"bootstrap.servers": servers})
    producer.produce(unique, serialize(value, context))
    assert producer.flush(10) == 0
    consumer = Consumer({"bootstrap.servers": servers, "group.id": unique})
    consumer.assign([TopicPartition(unique, 0, 0)])
    found = consumer.consume(1, 20)
    consumer.close()
    assert deserialize(found[0].value(), context) == value
    assert registry.ask("GET", f"/subjects/{unique}-value/versions/1").body.get("schemaType", "AVRO") == kind


def everything(client: RestClient) -> object:
    """All that a registry answers about what it knows."""
    paths = ("/schemas?deleted=true&subjectPrefix=:*:", "/config", "/mode", "/contexts")
    return [client.ask("GET", path).body for path in paths]


def test_what_was_answered_survives_kill_9_and_a_second_registry_takes_over(
    registry: RegistryProcess, servers: str, unique: str
) -> None:
    """Two registries know the same; the second one sends what is to be written to the first, and writes itself when that
    is killed; a third finds everything. (both engines)"""
    with RegistryProcess.start(servers) as second:
        ids = [second.register(f"{unique}-{i}", user({"name": f"a{i}", "type": "int"})).body["id"] for i in range(5)]
        assert len(set(ids)) == 5
        wait_until(lambda: everything(second) == everything(registry), "both to know the same")
    third = RegistryProcess.start(servers)
    with RegistryProcess.start(servers) as fourth:
        before = everything(registry)
        third.kill()
        wait_until(lambda: fourth.register(f"{unique}-last", user(ID)).status == 200, "somebody to write", 60)
        known = {json.dumps(each) for each in before[0]}  # type: ignore[index]
        assert known <= {json.dumps(each) for each in everything(fourth)[0]}  # type: ignore[index]


def test_its_group_has_no_lag(registry: RegistryProcess, servers: str, unique: str) -> None:
    """`headwater groups list` shows what the writer has applied. (both engines)"""
    assert registry.register(f"{unique}-lag", user(ID)).status == 200

    def lag() -> int:
        listed = CliRunner().invoke(commands, ["groups", "list", "--bootstrap-servers", servers, "--json"])
        return next(int(each["lag"]) for each in json.loads(listed.stdout) if each["group"] == "schema-registry")

    wait_until(lambda: lag() == 0, "the writer to commit what it has applied")


def test_a_registry_that_was_suspended_does_not_write_on_what_it_knew(servers: str, unique: str) -> None:
    """The writer sleeps until another one writes; what it was asked in its sleep gets an id that nobody has. (both
    engines)"""
    with RegistryProcess.start(servers) as first, RegistryProcess.start(servers) as second:
        wait_until(lambda: first.register(f"{unique}-a", user(ID)).status == 200, "somebody to write", 60)
        leader, other = (first, second) if first.leads(servers) else (second, first)
        os.kill(leader.process.pid, signal.SIGSTOP)
        answers: list[Answer] = []
        asked = threading.Thread(
            target=lambda: answers.append(leader.register(f"{unique}-c", user({"name": "c", "type": "int"})))
        )
        try:
            asked.start()
            wait_until(lambda: other.register(f"{unique}-b", user(NOTE)).status == 200, "the other one to write", 60)
        finally:
            os.kill(leader.process.pid, signal.SIGCONT)
        asked.join()
        wait_until(lambda: everything(first) == everything(second), "both to know the same")
        schemas = other.ask("GET", f"/schemas?subjectPrefix={unique}").body
        ids = [each["id"] for each in schemas]
        assert len(ids) == len(set(ids)) == (3 if answers[0].status == 200 else 2)


def test_writers_at_once_get_different_ids(registry: RegistryProcess, unique: str) -> None:
    """Sixteen threads register a hundred schemas, each of them twice: a hundred ids. (both engines)"""
    ids: dict[int, set[int]] = {i: set() for i in range(100)}

    def work(start: int) -> None:
        for i in range(start, 200, 16):
            answer = registry.register(f"{unique}-{i}", user({"name": f"{unique}{i % 100}", "type": "int"}))
            ids[i % 100].add(answer.body["id"])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(found) == 1 for found in ids.values())
    assert len(set.union(*ids.values())) == 100


def test_a_topic_that_confluents_registry_wrote_is_read(tmp_path: Path) -> None:
    """Its records, those of newer versions among them: schemas, deletes, config, mode; others are left alone. A default that
    doesn't fit, which it lets through, is found and followed, and not taken anew."""
    misfit = user({"name": "n", "type": "int", "default": "0"})
    records: list[tuple[object, object]] = [
        ({"keytype": "NOOP", "magic": 0}, None),
        ({"keytype": "CONFIG", "subject": None, "magic": 0}, {"compatibilityLevel": "FULL"}),
        (
            {"keytype": "SCHEMA", "subject": "a-value", "version": 1, "magic": 1},
            {"subject": "a-value", "version": 1, "id": 3, "guid": "x", "md5": "y", "schema": '"int"', "deleted": False},
        ),
        (
            {"keytype": "SCHEMA", "subject": "b", "version": 2, "magic": 1},
            {
                "subject": "b",
                "version": 2,
                "id": 5,
                "schemaType": "JSON",
                "references": [],
                "schema": "{}",
                "deleted": False,
            },
        ),
        ({"keytype": "DELETE_SUBJECT", "subject": "b", "magic": 0}, {"subject": "b", "version": 2}),
        (
            {"keytype": "SCHEMA", "subject": "misfit", "version": 1, "magic": 1},
            {
                "subject": "misfit",
                "version": 1,
                "id": 4,
                "schema": json.dumps(misfit, separators=(",", ":")),
                "deleted": False,
            },
        ),
        ({"keytype": "MODE", "subject": "a-value", "magic": 0}, {"mode": "READONLY"}),
        ({"keytype": "EXPORTER", "name": "e", "magic": 0}, {"name": "e"}),
    ]
    with BrokerProcess.start(tmp_path / "data") as broker:
        RegistryProcess.start(broker.bootstrap_servers).stop()
        producer = Producer({"bootstrap.servers": broker.bootstrap_servers})
        for key, value in records:
            encoded = json.dumps(value).encode() if value is not None else None
            producer.produce("_schemas", encoded, json.dumps(key, separators=(",", ":")).encode(), partition=0)
        assert producer.flush(10) == 0
        with RegistryProcess.start(broker.bootstrap_servers) as registry:
            ask = registry.ask
            assert ask("GET", "/config").body == {"compatibilityLevel": "FULL"}
            assert ask("GET", "/subjects/a-value/versions/1").body == {
                "subject": "a-value", "version": 1, "id": 3, "schema": '"int"',
            }  # fmt: skip
            assert ask("GET", "/subjects").body == ["a-value", "misfit"]
            assert ask("POST", "/subjects/misfit", body_of(misfit)).body["id"] == 4
            assert registry.register("misfit", user({"name": "n", "type": "int", "default": 0})).status == 200
            assert registry.register("d", misfit).code == 42201
            assert ask("GET", "/subjects/b/versions?deleted=true").body == [2]
            assert registry.register("a-value", '"long"').code == 42205
            assert registry.register("c", '"string"').body == {"id": 7}


def test_without_a_cluster_the_start_says_so() -> None:
    """One message, exit code 1."""
    command = [
        sys.executable,
        "-m",
        "headwater",
        "registry",
        "--listen",
        "127.0.0.1:0",
        "--bootstrap-servers",
        "127.0.0.1:1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 1
    assert "no broker answers" in done.stderr
    assert "Traceback" not in done.stderr


def test_with_the_broker_away_reads_go_on_and_writes_say_so(tmp_path: Path) -> None:
    """What is known is answered; what can't be written is an error within a bound, and nothing half done."""
    broker = BrokerProcess.start(tmp_path / "data")
    with RegistryProcess.start(broker.bootstrap_servers) as registry:
        id = registry.register("a", user(ID)).body["id"]
        broker.kill()
        assert json.loads(registry.ask("GET", f"/schemas/ids/{id}").body["schema"]) == user(ID)
        refused = registry.register("b", user(NOTE))
        assert refused.status == 500
        assert refused.code in (50001, 50004)
        broker = BrokerProcess.start(tmp_path / "data", listen=broker.bootstrap_servers)
        wait_until(lambda: registry.register("b", user(NOTE)).status == 200, "writes to go on", 60)
        assert registry.ask("GET", "/subjects").body == ["a", "b"]
    broker.stop()
