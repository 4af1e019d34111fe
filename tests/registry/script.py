"""Requests in an order that makes sense, asked of two registries: the steps build on each other."""

import json
from typing import NamedTuple

from tests.kit.registry import body_of

ID = {"name": "id", "type": "int"}
NOTE = {"name": "note", "type": ["null", "string"], "default": None}
MAIL = {"name": "mail", "type": "string"}


def user(*fields: object) -> dict[str, object]:
    return {"type": "record", "name": "User", "fields": list(fields)}


CLOSED = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
WIDER = {**CLOSED, "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}
STRICT = {**WIDER, "required": ["b"]}
PROTO = 'syntax = "proto3";\n\nmessage Line {\n  int32 amount = 1;\n}\n'
PROTO_WIDER = 'syntax = "proto3";\n\nmessage Line {\n  int32 amount = 1;\n  string text = 2;\n}\n'
PROTO_OTHER = 'syntax = "proto3";\n\nmessage Line {\n  string amount = 1;\n}\n'
ORDER = {"type": "record", "name": "Order", "fields": [{"name": "by", "type": "User"}]}


class Step(NamedTuple):
    name: str
    method: str
    path: str
    body: object = None


SCRIPT = [
    Step("nothing is there", "GET", "/subjects"),
    Step("types", "GET", "/schemas/types"),
    Step("global level", "GET", "/config"),
    Step("set the global level", "PUT", "/config", {"compatibility": "BACKWARD"}),
    Step("global mode", "GET", "/mode"),
    Step("register", "POST", "/subjects/u/versions", body_of(user(ID))),
    Step("register again", "POST", "/subjects/u/versions", body_of(user(ID))),
    Step("register elsewhere", "POST", "/subjects/v/versions", body_of(user(ID))),
    Step("register a second version", "POST", "/subjects/u/versions", body_of(user(ID, NOTE))),
    Step("register what is incompatible", "POST", "/subjects/u/versions", body_of(user(ID, NOTE, MAIL))),
    Step("register what is invalid", "POST", "/subjects/u/versions", body_of("{")),
    Step("register an unknown type", "POST", "/subjects/u/versions", body_of("{}", "XML")),
    Step("register nothing", "POST", "/subjects/u/versions", {"schema": ""}),
    Step("subjects", "GET", "/subjects"),
    Step("subjects by prefix", "GET", "/subjects?subjectPrefix=u"),
    Step("versions", "GET", "/subjects/u/versions"),
    Step("version 1", "GET", "/subjects/u/versions/1"),
    Step("latest", "GET", "/subjects/u/versions/latest"),
    Step("version 9", "GET", "/subjects/u/versions/9"),
    Step("version 0", "GET", "/subjects/u/versions/0"),
    Step("version x", "GET", "/subjects/u/versions/x"),
    Step("text of version 1", "GET", "/subjects/u/versions/1/schema"),
    Step("an unknown subject's versions", "GET", "/subjects/none/versions"),
    Step("schema by id", "GET", "/schemas/ids/1"),
    Step("text by id", "GET", "/schemas/ids/1/schema"),
    Step("an unknown id", "GET", "/schemas/ids/4711"),
    Step("subjects of an id", "GET", "/schemas/ids/1/subjects"),
    Step("versions of an id", "GET", "/schemas/ids/1/versions"),
    Step("look up", "POST", "/subjects/u", body_of(user(ID))),
    Step("look up what isn't there", "POST", "/subjects/u", body_of(user(MAIL))),
    Step("look up in an unknown subject", "POST", "/subjects/none", body_of(user(ID))),
    Step("check what may follow", "POST", "/compatibility/subjects/u/versions/latest", body_of(user(ID))),
    Step("check what may not", "POST", "/compatibility/subjects/u/versions/latest", body_of(user(ID, MAIL))),
    Step("check against all", "POST", "/compatibility/subjects/u/versions", body_of(user(ID))),
    Step("check an unknown subject", "POST", "/compatibility/subjects/none/versions/latest", body_of(user(ID))),
    Step("check an unknown version", "POST", "/compatibility/subjects/u/versions/9", body_of(user(ID))),
    Step("a subject's level", "GET", "/config/u"),
    Step("a subject's or the global level", "GET", "/config/u?defaultToGlobal=true"),
    Step("set a subject's level", "PUT", "/config/u", {"compatibility": "FULL"}),
    Step("the level that was set", "GET", "/config/u"),
    Step("set an unknown level", "PUT", "/config/u", {"compatibility": "SIDEWAYS"}),
    Step("full refuses", "POST", "/subjects/u/versions", body_of(user(NOTE))),
    Step("take the level back", "DELETE", "/config/u"),
    Step("with a reference", "POST", "/subjects/o/versions",
         body_of(ORDER, references=[{"name": "User", "subject": "u", "version": 1}])),
    Step("with an unknown reference", "POST", "/subjects/o2/versions",
         body_of(ORDER, references=[{"name": "User", "subject": "none", "version": 1}])),
    Step("referenced by", "GET", "/subjects/u/versions/1/referencedby"),
    Step("delete what is referenced", "DELETE", "/subjects/u/versions/1"),
    Step("json", "POST", "/subjects/j/versions", body_of(CLOSED, "JSON")),
    Step("wider json", "POST", "/subjects/j/versions", body_of(WIDER, "JSON")),
    Step("stricter json", "POST", "/subjects/j/versions", body_of(STRICT, "JSON")),
    Step("latest json", "GET", "/subjects/j/versions/latest"),
    Step("protobuf", "POST", "/subjects/p/versions", body_of(PROTO, "PROTOBUF")),
    Step("wider protobuf", "POST", "/subjects/p/versions", body_of(PROTO_WIDER, "PROTOBUF")),
    Step("other protobuf", "POST", "/subjects/p/versions", body_of(PROTO_OTHER, "PROTOBUF")),
    Step("latest protobuf", "GET", "/subjects/p/versions/latest"),
    Step("another type", "POST", "/subjects/p/versions", body_of(user(ID))),
    Step("delete for good at once", "DELETE", "/subjects/j/versions/1?permanent=true"),
    Step("delete a version", "DELETE", "/subjects/j/versions/1"),
    Step("delete it again", "DELETE", "/subjects/j/versions/1"),
    Step("versions that are left", "GET", "/subjects/j/versions"),
    Step("versions with deleted ones", "GET", "/subjects/j/versions?deleted=true"),
    Step("delete it for good", "DELETE", "/subjects/j/versions/1?permanent=true"),
    Step("delete a subject for good at once", "DELETE", "/subjects/j?permanent=true"),
    Step("delete a subject", "DELETE", "/subjects/j"),
    Step("delete the subject again", "DELETE", "/subjects/j"),
    Step("subjects without it", "GET", "/subjects"),
    Step("subjects with it", "GET", "/subjects?deleted=true"),
    Step("delete the subject for good", "DELETE", "/subjects/j?permanent=true"),
    Step("delete an unknown subject", "DELETE", "/subjects/none"),
    Step("set a mode", "PUT", "/mode/v", {"mode": "READONLY"}),
    Step("register into it", "POST", "/subjects/v/versions", body_of(user(ID, NOTE))),
    Step("set an unknown mode", "PUT", "/mode/v", {"mode": "SLEEPY"}),
    Step("take the mode back", "DELETE", "/mode/v"),
    Step("all schemas", "GET", "/schemas?latestOnly=true&subjectPrefix=u"),
    Step("contexts", "GET", "/contexts"),
    Step("no JSON", "POST", "/subjects/u/versions", b"{"),
    Step("nonsense", "GET", "/nonsense"),
]  # fmt: skip


def comparable(body: object) -> object:
    """Without the words: messages are everybody's own, texts of schemas are compared by what they mean."""
    if isinstance(body, dict) and "error_code" in body:
        return body["error_code"]
    if isinstance(body, dict):
        return {
            name: _meaning(value) if name == "schema" else comparable(value) for name, value in sorted(body.items())
        }
    if isinstance(body, list):
        found = [comparable(each) for each in body]
        return sorted(found, key=json.dumps)
    return _meaning(body) if isinstance(body, str) else body


def _meaning(text: object) -> object:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return " ".join(text.split())
