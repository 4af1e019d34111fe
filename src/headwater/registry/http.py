"""Confluent's REST API over the registry: one function per resource and verb; what it can't do it leaves out.

Left out: exporters, DEKs, associations, GUIDs and tags. Every other path answers as Confluent's registry does; the
differences, with their reasons, are in docs/reference/registry.md.
"""

import asyncio
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headwater import __version__
from headwater.registry import errors
from headwater.registry.errors import RegistryError
from headwater.registry.record import ConfigValue
from headwater.registry.service import NotLeader, RegistryService
from headwater.registry.storage import StoreFailed
from headwater.registry.subject import DEFAULT_CONTEXT, Mode, Version, context_of
from headwater.schema.compatibility import Level
from headwater.schema.schema import MAX_BYTES, Reference, Schema, SchemaType

MEDIA_TYPE = "application/vnd.schemaregistry.v1+json"
FORWARDED = "X-Forward"
UNKNOWN_PROPERTIES = "Confluent-Accept-Unknown-Properties"
FORWARD_SECONDS = 30.0
MAX_BODY = 2 * MAX_BYTES
MAX_VERSION = 2**31 - 1
GLOBAL = "__GLOBAL"
LEVELS = ", ".join(Level)
MODES = ", ".join(Mode)


class RegisterRequest(msgspec.Struct, forbid_unknown_fields=True):
    schema: str
    schemaType: str | None = None
    references: list[Reference] | None = None
    metadata: dict[str, Any] | None = None
    ruleSet: dict[str, Any] | None = None
    id: int | None = None
    version: int | None = None
    schemaTagsToAdd: list[Any] | None = None
    schemaTagsToRemove: list[Any] | None = None


class ConfigRequest(msgspec.Struct, forbid_unknown_fields=True):
    compatibility: str | None = None
    normalize: bool | None = None
    alias: str | None = None
    compatibilityGroup: str | None = None
    defaultMetadata: dict[str, Any] | None = None
    overrideMetadata: dict[str, Any] | None = None
    defaultRuleSet: dict[str, Any] | None = None
    overrideRuleSet: dict[str, Any] | None = None


class ModeRequest(msgspec.Struct, forbid_unknown_fields=True):
    mode: str


class Handlers:
    def __init__(self, service: RegistryService) -> None:
        self._service = service
        self._registry = service.registry

    # Schemas by id

    async def types(self, request: Request) -> object:
        return [SchemaType.JSON, SchemaType.PROTOBUF, SchemaType.AVRO]

    async def list_schemas(self, request: Request) -> object:
        found = self._registry.schemas(
            request.query_params.get("subjectPrefix", ""),
            deleted=_flag(request, "deleted"),
            latest_only=_flag(request, "latestOnly"),
        )
        return [_version_json(subject, version) for subject, version in _page(request, found)]

    async def schema_by_id(self, request: Request) -> object:
        context, id = self._id_of(request)
        schema = self._registry.schema(id, context)
        answer = {**_schema_json(schema), "schema": self._text(request, schema)}
        if _flag(request, "fetchMaxId"):
            answer["maxId"] = self._registry.max_id(context)
        return answer

    async def schema_text_by_id(self, request: Request) -> object:
        context, id = self._id_of(request)
        text = self._text(request, self._registry.schema(id, context))
        return Response(text, media_type=MEDIA_TYPE)

    async def subjects_of_id(self, request: Request) -> object:
        context, id = self._id_of(request)
        users = self._registry.users(id, context, deleted=_flag(request, "deleted"))
        return _page(request, sorted({subject for subject, _ in users}))

    async def versions_of_id(self, request: Request) -> object:
        context, id = self._id_of(request)
        users = self._registry.users(id, context, deleted=_flag(request, "deleted"))
        return [{"subject": subject, "version": version} for subject, version in _page(request, users)]

    def _id_of(self, request: Request) -> tuple[str, int]:
        """With the context of the subject that it is asked for with. Raises 40403."""
        text = request.path_params["id"]
        if not text.isdecimal() or int(text) > MAX_VERSION:
            raise HTTPException(404, "HTTP 404 Not Found")
        subject = request.query_params.get("subject", "")
        if subject and context_of(subject) != DEFAULT_CONTEXT:
            return context_of(subject), int(text)
        return DEFAULT_CONTEXT, int(text)

    def _text(self, request: Request, schema: Schema) -> str:
        format = request.query_params.get("format", "")
        if schema.type is SchemaType.PROTOBUF and format == "serialized":
            return str(self._registry.parse(schema).serialized())  # type: ignore[attr-defined]
        return schema.text

    # Subjects

    async def list_subjects(self, request: Request) -> object:
        found = self._registry.subjects(
            request.query_params.get("subjectPrefix", ""),
            deleted=_flag(request, "deleted"),
            deleted_only=_flag(request, "deletedOnly"),
        )
        return _page(request, found)

    async def lookup(self, request: Request) -> object:
        subject = self._subject(request)
        body = await _body(request, RegisterRequest)
        version = self._registry.lookup(
            subject, _schema_of(body), normalize=_flag(request, "normalize"), deleted=_flag(request, "deleted")
        )
        return _version_json(subject, version)

    async def delete_subject(self, request: Request) -> object:
        subject, permanent = self._subject(request), _flag(request, "permanent")
        return await self._service.write(lambda: self._registry.decide_delete_subject(subject, permanent=permanent))

    async def list_versions(self, request: Request) -> object:
        found = self._registry.versions(
            self._subject(request), deleted=_flag(request, "deleted"), deleted_only=_flag(request, "deletedOnly")
        )
        numbers = [version.version for version in found]
        if _flag(request, "deletedAsNegative"):
            numbers = [-version.version if version.is_deleted else version.version for version in found]
        return _page(request, numbers)

    async def register(self, request: Request) -> object:
        subject = self._subject(request)
        body = await _body(request, RegisterRequest)
        schema, normalize = _schema_of(body), _flag(request, "normalize")
        registered = await self._service.write(
            lambda: self._registry.decide_register(
                subject, schema, id=_positive(body.id), version=_positive(body.version), normalize=normalize
            )
        )
        if body.metadata is None and body.ruleSet is None:
            return {"id": registered.id}
        return _version_json(subject, self._registry.version(subject, registered.version))

    async def version(self, request: Request) -> object:
        subject = self._subject(request)
        version = self._version(request, subject, deleted=_flag(request, "deleted"))
        return {**_version_json(subject, version), "schema": self._text(request, version.schema)}

    async def version_text(self, request: Request) -> object:
        version = self._version(request, self._subject(request), deleted=_flag(request, "deleted"))
        return Response(self._text(request, version.schema), media_type=MEDIA_TYPE)

    async def referenced_by(self, request: Request) -> object:
        subject = self._subject(request)
        version = self._version(request, subject, deleted=True)
        return _page(request, self._registry.referrers(subject, version.version))

    async def delete_version(self, request: Request) -> object:
        subject, permanent = self._subject(request), _flag(request, "permanent")
        number = _version_number(request)
        return await self._service.write(
            lambda: self._registry.decide_delete_version(subject, number, permanent=permanent)
        )

    async def metadata(self, request: Request) -> object:
        """The latest version whose metadata has these properties."""
        subject = self._subject(request)
        keys, values = request.query_params.getlist("key"), request.query_params.getlist("value")
        wanted = dict(zip(keys, values, strict=False))
        for version in reversed(self._registry.versions(subject, deleted=_flag(request, "deleted"))):
            properties = (version.schema.metadata or {}).get("properties") or {}
            if all(properties.get(key) == value for key, value in wanted.items()):
                return _version_json(subject, version)
        raise errors.schema_not_found()

    def _subject(self, request: Request) -> str:
        """What the alias of the subject stands for."""
        name = _name(request)
        config = self._registry.config(name)
        return config.alias if config is not None and config.alias else name

    def _version(self, request: Request, subject: str, *, deleted: bool) -> Version:
        return self._registry.version(subject, _version_number(request), deleted=deleted)

    # Compatibility

    async def check_version(self, request: Request) -> object:
        return await self._check(request, _version_number(request), all_versions=False)

    async def check_all(self, request: Request) -> object:
        return await self._check(request, None, all_versions=True)

    async def _check(self, request: Request, number: int | None, *, all_versions: bool) -> object:
        subject = self._subject(request)
        body = await _body(request, RegisterRequest)
        messages = self._registry.check(
            subject, _schema_of(body), number, all_versions=all_versions, normalize=_flag(request, "normalize")
        )
        answer: dict[str, object] = {"is_compatible": not messages}
        if _flag(request, "verbose"):
            answer["messages"] = messages
        return answer

    # Config and mode

    async def get_config(self, request: Request) -> object:
        subject = _scope(request)
        own = self._registry.config(subject)
        if subject is not None and own is None and not _flag(request, "defaultToGlobal"):
            raise errors.no_config(subject)
        config = self._registry.effective_config(subject) if own is None or subject is None else own
        return _set(config)

    async def put_config(self, request: Request) -> object:
        subject = _scope(request)
        body = await _body(request, ConfigRequest)
        if body.compatibility is not None and body.compatibility.upper() not in Level.__members__:
            raise errors.invalid_level(body.compatibility, LEVELS)
        given = {name: value for name, value in msgspec.structs.asdict(body).items() if value is not None}
        level = given.pop("compatibility", None)
        changes = {**given, **({"compatibilityLevel": level.upper()} if level is not None else {})}
        await self._service.write(lambda: (self._registry.decide_config(subject, changes), None))
        return {**given, **({"compatibility": level.upper()} if level is not None else {})}

    async def delete_config(self, request: Request) -> object:
        subject = _scope(request)
        before = await self._service.write(lambda: self._registry.decide_delete_config(subject))
        return _set(before if before is not None else self._registry.effective_config(None))

    async def get_mode(self, request: Request) -> object:
        subject = _scope(request)
        own = self._registry.mode(subject)
        if subject is not None and own is None and not _flag(request, "defaultToGlobal"):
            raise errors.no_mode(subject)
        return {"mode": self._registry.effective_mode(subject)}

    async def put_mode(self, request: Request) -> object:
        subject, force = _scope(request), _flag(request, "force")
        body = await _body(request, ModeRequest)
        if body.mode.upper() not in Mode.__members__:
            raise errors.invalid_mode(body.mode, MODES)
        mode = Mode(body.mode.upper())
        await self._service.write(lambda: (self._registry.decide_mode(subject, mode, force=force), None))
        return {"mode": mode}

    async def delete_mode(self, request: Request) -> object:
        subject = _scope(request)
        before = await self._service.write(lambda: self._registry.decide_delete_mode(subject))
        return {"mode": before or Mode.READWRITE}

    # About the registry

    async def contexts(self, request: Request) -> object:
        return _page(request, self._registry.contexts())

    async def root(self, request: Request) -> object:
        return {}

    async def metadata_id(self, request: Request) -> object:
        return {"scope": {"path": [], "clusters": {"schema-registry-cluster": "schema-registry"}}, "id": ""}

    async def metadata_version(self, request: Request) -> object:
        return {"version": __version__, "commitId": ""}


Handler = Callable[[Request], Awaitable[object]]


def create_app(service: RegistryService) -> Starlette:
    on = Handlers(service)

    def route(path: str, **verbs: Handler) -> Route:
        async def endpoint(request: Request) -> Response:
            return await _answered(
                service, request, verbs["get" if request.method == "HEAD" else request.method.lower()]
            )

        return Route(path, endpoint, methods=[verb.upper() for verb in verbs])

    return Starlette(
        routes=[
            route("/", get=on.root, post=on.root),
            route("/schemas", get=on.list_schemas),
            route("/schemas/types", get=on.types),
            route("/schemas/ids/{id}", get=on.schema_by_id),
            route("/schemas/ids/{id}/schema", get=on.schema_text_by_id),
            route("/schemas/ids/{id}/subjects", get=on.subjects_of_id),
            route("/schemas/ids/{id}/versions", get=on.versions_of_id),
            route("/subjects", get=on.list_subjects),
            route("/subjects/{subject:path}/versions", get=on.list_versions, post=on.register),
            route("/subjects/{subject:path}/versions/{version}", get=on.version, delete=on.delete_version),
            route("/subjects/{subject:path}/versions/{version}/schema", get=on.version_text),
            route("/subjects/{subject:path}/versions/{version}/referencedby", get=on.referenced_by),
            route("/subjects/{subject:path}/metadata", get=on.metadata),
            route("/subjects/{subject:path}", post=on.lookup, delete=on.delete_subject),
            route("/compatibility/subjects/{subject:path}/versions/{version}", post=on.check_version),
            route("/compatibility/subjects/{subject:path}/versions", post=on.check_all),
            route("/config", get=on.get_config, put=on.put_config, delete=on.delete_config),
            route("/config/{subject:path}", get=on.get_config, put=on.put_config, delete=on.delete_config),
            route("/mode", get=on.get_mode, put=on.put_mode, delete=on.delete_mode),
            route("/mode/{subject:path}", get=on.get_mode, put=on.put_mode, delete=on.delete_mode),
            route("/contexts", get=on.contexts),
            route("/v1/metadata/id", get=on.metadata_id),
            route("/v1/metadata/version", get=on.metadata_version),
        ],
        exception_handlers={HTTPException: _http_error},  # type: ignore[dict-item]
    )


async def _answered(service: RegistryService, request: Request, handler: Handler) -> Response:
    try:
        answer = await handler(request)
    except NotLeader as error:
        return await _forward(request, error.address)
    except RegistryError as error:
        return _error(error.status, error.code, str(error))
    except StoreFailed as error:
        return _error(500, 50001, f"Error in the backend data store: {error}")
    return answer if isinstance(answer, Response) else _json(answer)


async def _forward(request: Request, address: str | None) -> Response:
    """To the registry that writes, once: one that was asked by another one does not ask a third."""
    if address is None or FORWARDED in request.headers:
        return _error(500, 50004, "Unknown leader while forwarding the request: try again")
    body = await request.body()
    url = f"{address}{request.url.path}" + (f"?{request.url.query}" if request.url.query else "")
    forwarded = urllib.request.Request(url, body or None, method=request.method)
    forwarded.add_header(FORWARDED, "true")
    forwarded.add_header("Content-Type", request.headers.get("content-type", MEDIA_TYPE))
    if UNKNOWN_PROPERTIES in request.headers:
        forwarded.add_header(UNKNOWN_PROPERTIES, request.headers[UNKNOWN_PROPERTIES])

    def ask() -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(forwarded, timeout=FORWARD_SECONDS) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    try:
        status, content = await asyncio.get_running_loop().run_in_executor(None, ask)
    except OSError as error:
        return _error(500, 50003, f"Error while forwarding the request to {address}: {error}")
    return Response(content, status, media_type=MEDIA_TYPE)


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type=MEDIA_TYPE)


def _error(status: int, code: int, message: str) -> Response:
    return _json({"error_code": code, "message": message}, status)


async def _http_error(request: Request, error: HTTPException) -> Response:
    return _error(error.status_code, error.status_code, error.detail)


def _name(request: Request) -> str:
    name = str(request.path_params["subject"])
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        raise RegistryError(42208, f"The specified subject '{name!r}' is not a valid subject.")
    return name


def _scope(request: Request) -> str | None:
    """The subject, or None for all."""
    if "subject" not in request.path_params:
        return None
    name = _name(request)
    return None if name == GLOBAL else name


def _version_number(request: Request) -> int | None:
    """None for the latest. Raises 42202."""
    text = request.path_params["version"]
    if text.lower() == "latest" or text == "-1":
        return None
    if not text.isdecimal() or not 1 <= int(text) <= MAX_VERSION:
        raise errors.invalid_version(text)
    return int(text)


def _flag(request: Request, name: str) -> bool:
    return request.query_params.get(name, "").lower() == "true"


def _page(request: Request, found: list[Any]) -> list[Any]:
    offset, limit = (request.query_params.get(name, default) for name, default in (("offset", "0"), ("limit", "-1")))
    try:
        start, count = max(0, int(offset)), int(limit)
    except ValueError:
        raise HTTPException(404, "HTTP 404 Not Found") from None
    return found[start : start + count] if count > 0 else found[start:]


async def _body(request: Request, kind: type[Any]) -> Any:
    """Raises RegistryError 42201, HTTPException."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise errors.too_large(len(body), MAX_BODY)
    request._body = body  # it may have to be forwarded
    try:
        if request.headers.get(UNKNOWN_PROPERTIES, "").lower() == "true":
            known = set(kind.__struct_fields__)
            given = msgspec.json.decode(body)
            given = (
                {name: value for name, value in given.items() if name in known} if isinstance(given, dict) else given
            )
            return msgspec.convert(given, kind)
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise HTTPException(422, str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HTTPException(400, f"The body is no JSON: {error}") from None


def _schema_of(body: RegisterRequest) -> Schema:
    name = (body.schemaType or SchemaType.AVRO).upper()
    if name not in SchemaType.__members__:
        raise errors.invalid_schema(f"Invalid schema type {body.schemaType}. Known are {', '.join(SchemaType)}")
    if body.schemaTagsToAdd or body.schemaTagsToRemove:
        raise HTTPException(422, "schemaTagsToAdd and schemaTagsToRemove are not supported")
    return Schema(body.schema, SchemaType(name), tuple(body.references or ()), body.metadata, body.ruleSet)


def _positive(number: int | None) -> int | None:
    """Clients write 0 and -1 for none."""
    return number if number is not None and number > 0 else None


def _schema_json(schema: Schema) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if schema.type is not SchemaType.AVRO:
        found["schemaType"] = schema.type
    if schema.references:
        found["references"] = schema.references
    if schema.metadata is not None:
        found["metadata"] = schema.metadata
    if schema.rule_set is not None:
        found["ruleSet"] = schema.rule_set
    return found


def _version_json(subject: str, version: Version) -> dict[str, Any]:
    found = {"subject": subject, "version": version.version, "id": version.id, **_schema_json(version.schema)}
    found["schema"] = version.schema.text
    if version.is_deleted:
        found["deleted"] = True
    return found


def _set(config: ConfigValue) -> dict[str, Any]:
    return {name: value for name, value in msgspec.structs.asdict(config).items() if value is not None}
