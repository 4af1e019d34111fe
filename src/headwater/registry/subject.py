"""Subjects, versions and ids: what the registry knows, and what it decides.

One shape: `decide_*` looks at the state and returns the records that are to be written, with the answer; only `apply`
changes the state, at start-up for the whole of `_schemas`, later for each record that was read back. No I/O here.

Ids are given per context (`:.name:subject`; "." without one), ascending; equal schemas share one. A version is never
given twice in a subject, also not after a soft delete.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec

from headwater.registry import errors
from headwater.registry.record import (
    ConfigKey,
    ConfigValue,
    DeleteSubjectKey,
    DeleteSubjectValue,
    Key,
    ModeKey,
    ModeValue,
    Record,
    SchemaKey,
    SchemaValue,
)
from headwater.schema.compatibility import Earlier, Level, differences
from headwater.schema.schema import MAX_BYTES, InvalidSchema, Parsed, Reference, Schema, SchemaType

DEFAULT_CONTEXT = "."
PARSED_KEPT = 200
MAX_REFERENCES = 100
"""Of one schema, those of its references included."""


class Mode(StrEnum):
    READWRITE = "READWRITE"
    READONLY = "READONLY"
    READONLY_OVERRIDE = "READONLY_OVERRIDE"
    IMPORT = "IMPORT"


class Version(msgspec.Struct, frozen=True):
    version: int
    id: int
    schema: Schema
    is_deleted: bool = False


class Registered(NamedTuple):
    id: int
    version: int


class Registry:
    def __init__(self) -> None:
        self._subjects: dict[str, dict[int, Version]] = {}
        self._schemas: dict[str, dict[int, Schema]] = {}
        """By context and id."""
        self._ids: dict[str, dict[bytes, int]] = {}
        """By context and digest."""
        self._users: dict[tuple[str, int], set[tuple[str, int]]] = {}
        """By context and id: subjects and versions, deleted ones among them."""
        self._referrers: dict[tuple[str, int], set[tuple[str, int]]] = {}
        """By subject and version: those that reference it."""
        self._next_ids: dict[str, int] = {}
        self._configs: dict[str | None, ConfigValue] = {}
        self._modes: dict[str | None, Mode] = {}
        self._parsed: OrderedDict[bytes, Parsed] = OrderedDict()

    # Looking

    def subjects(self, prefix: str = "", *, deleted: bool = False, deleted_only: bool = False) -> list[str]:
        found = []
        for name, versions in self._subjects.items():
            is_live = any(not version.is_deleted for version in versions.values())
            wanted = not is_live if deleted_only else is_live or deleted
            if wanted and _has_prefix(name, prefix):
                found.append(name)
        return sorted(found)

    def versions(self, subject: str, *, deleted: bool = False, deleted_only: bool = False) -> list[Version]:
        """Ascending. Raises 40401."""
        found = [
            version
            for version in self._subjects.get(subject, {}).values()
            if (version.is_deleted if deleted_only else deleted or not version.is_deleted)
        ]
        if not found:
            raise errors.subject_not_found(subject)
        return sorted(found, key=lambda version: version.version)

    def version(self, subject: str, number: int | None, *, deleted: bool = False) -> Version:
        """number: None is the latest. Raises 40401, 40402."""
        versions = self.versions(subject, deleted=deleted)
        if number is None:
            return versions[-1]
        for version in versions:
            if version.version == number:
                return version
        raise errors.version_not_found(number)

    def schema(self, id: int, context: str = DEFAULT_CONTEXT) -> Schema:
        """Raises 40403."""
        found = self._schemas.get(context, {}).get(id)
        if found is None:
            raise errors.schema_not_found(id)
        return found

    def schemas(
        self, prefix: str = "", *, deleted: bool = False, latest_only: bool = False
    ) -> list[tuple[str, Version]]:
        found = []
        for subject in self.subjects(prefix, deleted=deleted):
            versions = self.versions(subject, deleted=deleted)
            found += [(subject, version) for version in (versions[-1:] if latest_only else versions)]
        return found

    def users(self, id: int, context: str, *, deleted: bool = False) -> list[tuple[str, int]]:
        """Subjects and versions with this id. Raises 40403."""
        self.schema(id, context)
        found = self._users.get((context, id), set())
        return sorted(use for use in found if deleted or not self._subjects[use[0]][use[1]].is_deleted)

    def referrers(self, subject: str, version: int) -> list[int]:
        """Ids of the schemas that reference it."""
        found = self._referrers.get((subject, version), set())
        return sorted({self._subjects[name][number].id for name, number in found})

    def max_id(self, context: str = DEFAULT_CONTEXT) -> int:
        return self._next_ids.get(context, 1) - 1

    def contexts(self) -> list[str]:
        return sorted({DEFAULT_CONTEXT, *self._schemas})

    def lookup(self, subject: str, schema: Schema, *, normalize: bool = False, deleted: bool = False) -> Version:
        """The version with that schema. Raises 40401, 40403, 42201."""
        versions = self.versions(subject, deleted=deleted)
        wanted = self.canonical(schema, normalize=normalize)
        for version in reversed(versions):
            if _same(version.schema, wanted):
                return version
        raise errors.schema_not_found()

    # Config and mode

    def config(self, subject: str | None) -> ConfigValue | None:
        return self._configs.get(subject)

    def effective_config(self, subject: str | None) -> ConfigValue:
        """What isn't set for the subject is its context's, then the global one's; without that BACKWARD."""
        found: dict[str, Any] = {"compatibilityLevel": Level.BACKWARD}
        for scope in reversed(_scopes(subject)):
            found.update(_set(self._configs.get(scope)))
        return ConfigValue(**found)

    def mode(self, subject: str | None) -> Mode | None:
        return self._modes.get(subject)

    def effective_mode(self, subject: str | None) -> Mode:
        found = (self._modes.get(scope) for scope in _scopes(subject))
        return next((mode for mode in found if mode is not None), Mode.READWRITE)

    # Understanding schemas

    def canonical(self, schema: Schema, *, normalize: bool = False) -> Schema:
        """In the form that it is kept in. Raises 42201, 42209."""
        size = len(schema.text.encode("utf-8", "surrogatepass"))
        if size > MAX_BYTES:
            raise errors.too_large(size, MAX_BYTES)
        if not schema.text.strip():
            raise errors.invalid_schema("Empty schema")
        parsed = self.parse(schema)
        text = parsed.text
        if normalize and schema.type is SchemaType.JSON:
            text = msgspec.json.encode(msgspec.json.decode(text), order="sorted").decode()
        references = tuple(sorted(schema.references, key=lambda r: r.name)) if normalize else schema.references
        return msgspec.structs.replace(schema, text=text, references=references)

    def _check_new(self, schema: Schema) -> None:
        """What a registry before this one may have let through is read, but not taken anew. Raises 42201."""
        try:
            self.parse(schema).check_new()
        except InvalidSchema as error:
            raise errors.invalid_schema(f"Invalid schema {schema.text[:2000]}, details: {error}") from None

    def parse(self, schema: Schema) -> Parsed:
        """Raises 42201."""
        digest = schema.digest()
        known = self._parsed.get(digest)
        if known is not None:
            self._parsed.move_to_end(digest)
            return known
        try:
            texts = self._texts_of(schema.references)
            parsed = _parse(schema.type, schema.text, texts)
        except InvalidSchema as error:
            raise errors.invalid_schema(
                f"Invalid schema {schema.text[:2000]} with refs {_shown(schema.references)} of type {schema.type}, "
                f"details: {error}"
            ) from None
        self._parsed[digest] = parsed
        if len(self._parsed) > PARSED_KEPT:
            self._parsed.popitem(last=False)
        return parsed

    def _texts_of(self, references: Sequence[Reference]) -> dict[str, str]:
        """Of all that it needs, those first that others need. Raises InvalidSchema."""
        found: dict[str, str] = {}
        under_way: set[str] = set()

        def add(reference: Reference) -> None:
            if reference.name in found:
                return
            if reference.name in under_way or len(under_way) > MAX_REFERENCES:
                raise InvalidSchema(f"the reference {reference.name!r} leads back to itself")
            version = self._subjects.get(reference.subject, {}).get(reference.version)
            if version is None:
                raise InvalidSchema(
                    f'No schema reference found for subject "{reference.subject}" and version {reference.version}'
                )
            under_way.add(reference.name)
            for inner in version.schema.references:
                add(inner)
            found[reference.name] = version.schema.text

        for reference in references:
            add(reference)
        return found

    # Deciding

    def decide_register(
        self,
        subject: str,
        schema: Schema,
        *,
        id: int | None = None,
        version: int | None = None,
        normalize: bool = False,
    ) -> tuple[list[Record], Registered]:
        """Raises RegistryError."""
        config = self.effective_config(subject)
        mode = self._check_writable(subject)
        if id is not None and mode is not Mode.IMPORT:
            raise errors.not_permitted(f"Subject {subject} is not in import mode")
        schema = _with_defaults(schema, config)
        wanted = self.canonical(schema, normalize=normalize or bool(config.normalize))
        context = context_of(subject)
        all_versions = self._subjects.get(subject, {})
        live = sorted((v for v in all_versions.values() if not v.is_deleted), key=lambda v: -v.version)
        for known in live:
            if _same(known.schema, wanted) and id in (None, known.id) and version in (None, known.version):
                return [], Registered(known.id, known.version)
        self._check_new(wanted)
        if mode is not Mode.IMPORT:
            messages = self._against(subject, wanted, live, config)
            if messages:
                raise errors.incompatible(subject, messages)
        next_version = max(all_versions, default=0) + 1
        if version is not None and mode is not Mode.IMPORT and version != next_version:
            raise errors.invalid_schema(f"Version is not one more than previous version: expected {next_version}")
        if id is not None:
            taken = self._schemas.get(context, {}).get(id)
            if taken is not None and taken.digest() != wanted.digest():
                raise errors.id_taken(id)
        given = id or self._ids.get(context, {}).get(wanted.digest()) or self._next_ids.get(context, 1)
        number = version or next_version
        record = _schema_record(subject, Version(number, given, wanted))
        return [record], Registered(given, number)

    def check(
        self, subject: str, schema: Schema, number: int | None, *, all_versions: bool = False, normalize: bool = False
    ) -> list[str]:
        """What stands against registering it. number: compare with this version alone; None is the latest. Raises
        RegistryError."""
        config = self.effective_config(subject)
        wanted = self.canonical(schema, normalize=normalize or bool(config.normalize))
        self._check_new(wanted)
        if all_versions:
            versions = [v for v in self._subjects.get(subject, {}).values() if not v.is_deleted]
            live = sorted(versions, key=lambda version: -version.version)
        else:
            live = [self.version(subject, number)]
        return self._against(subject, wanted, live, config)

    def _against(self, subject: str, schema: Schema, live: Sequence[Version], config: ConfigValue) -> list[str]:
        level = Level(config.compatibilityLevel or Level.BACKWARD)
        group = config.compatibilityGroup
        if group is not None:
            live = [version for version in live if _property(version.schema, group) == _property(schema, group)]
        return differences(level, schema, [Earlier(v.version, v.schema) for v in live], self.parse)

    def decide_delete_subject(self, subject: str, *, permanent: bool) -> tuple[list[Record], list[int]]:
        self._check_writable(subject)
        versions = self._subjects.get(subject)
        if not versions:
            raise errors.subject_not_found(subject)
        live = sorted(number for number, version in versions.items() if not version.is_deleted)
        if permanent and live:
            raise errors.subject_not_soft_deleted(subject)
        if not permanent and not live:
            raise errors.subject_soft_deleted(subject)
        numbers = sorted(versions) if permanent else live
        for number in numbers:
            self._check_unreferenced(subject, number)
        if not permanent:
            value = DeleteSubjectValue(subject=subject, version=numbers[-1])
            return [Record(DeleteSubjectKey(subject=subject), value), *self._without_settings(subject)], numbers
        records = [Record(SchemaKey(subject=subject, version=number), None) for number in numbers]
        return [*records, *self._without_settings(subject)], numbers

    def _without_settings(self, subject: str) -> list[Record]:
        """Config and mode go with the last version that is live."""
        records: list[Record] = []
        if subject in self._configs:
            records.append(Record(ConfigKey(subject=subject), None))
        if subject in self._modes:
            records.append(Record(ModeKey(subject=subject), None))
        return records

    def decide_delete_version(self, subject: str, number: int | None, *, permanent: bool) -> tuple[list[Record], int]:
        self._check_writable(subject)
        version = self.version(subject, number, deleted=number is not None)
        if permanent and not version.is_deleted:
            raise errors.version_not_soft_deleted(subject, version.version)
        if not permanent and version.is_deleted:
            raise errors.version_soft_deleted(subject, version.version)
        self._check_unreferenced(subject, version.version)
        if permanent:
            return [Record(SchemaKey(subject=subject, version=version.version), None)], version.version
        gone = [_schema_record(subject, msgspec.structs.replace(version, is_deleted=True))]
        is_last = all(each.is_deleted or each is version for each in self._subjects[subject].values())
        return [*gone, *(self._without_settings(subject) if is_last else ())], version.version

    def decide_config(self, subject: str | None, changes: Mapping[str, Any]) -> list[Record]:
        """What is not among the changes stays as it is."""
        before = self._configs.get(subject) or ConfigValue()
        return [Record(ConfigKey(subject=subject), msgspec.structs.replace(before, **changes))]

    def decide_delete_config(self, subject: str | None) -> tuple[list[Record], ConfigValue | None]:
        """With what was set. Raises 40401."""
        before = self._configs.get(subject)
        if subject is not None and before is None:
            raise errors.subject_not_found(subject)
        return [Record(ConfigKey(subject=subject), None)], before

    def decide_mode(self, subject: str | None, mode: Mode, *, force: bool = False) -> list[Record]:
        if mode is Mode.IMPORT and not force and self._has_schemas(subject):
            raise errors.not_permitted("Cannot import since found existing subjects")
        return [Record(ModeKey(subject=subject), ModeValue(mode=mode))]

    def _has_schemas(self, scope: str | None) -> bool:
        """In a subject that is live, in a context that has subjects, or at all."""
        if scope is None:
            return bool(self._subjects)
        if scope == _scope_of(context_of(scope)):
            return any(name.startswith(scope) for name in self._subjects)
        return any(not version.is_deleted for version in self._subjects.get(scope, {}).values())

    def decide_delete_mode(self, subject: str | None) -> tuple[list[Record], Mode | None]:
        """With what was set. Raises 40401."""
        before = self._modes.get(subject)
        if subject is not None and before is None:
            raise errors.subject_not_found(subject)
        return [Record(ModeKey(subject=subject), None)], before

    def _check_writable(self, subject: str) -> Mode:
        mode = self.effective_mode(subject)
        if self._modes.get(None) is Mode.READONLY_OVERRIDE:
            mode = Mode.READONLY_OVERRIDE
        if mode in (Mode.READONLY, Mode.READONLY_OVERRIDE):
            raise errors.not_permitted(f"Subject {subject} is in read-only mode")
        return mode

    def _check_unreferenced(self, subject: str, number: int) -> None:
        others = {
            use
            for use in self._referrers.get((subject, number), set())
            if not self._subjects[use[0]][use[1]].is_deleted
        }
        if others:
            raise errors.reference_exists(subject, number)

    # Applying

    def apply(self, key: Key, value: object) -> None:
        """A record of `_schemas`; what it says replaces what was known of its key."""
        if isinstance(key, SchemaKey):
            self._apply_schema(key, value if isinstance(value, SchemaValue) else None)
        elif isinstance(key, ConfigKey):
            _put(self._configs, key.subject, value if isinstance(value, ConfigValue) else None)
        elif isinstance(key, ModeKey):
            _put(self._modes, key.subject, Mode(value.mode) if isinstance(value, ModeValue) else None)
        elif isinstance(key, DeleteSubjectKey) and isinstance(value, DeleteSubjectValue):
            for number, version in self._subjects.get(value.subject, {}).items():
                if number <= value.version:
                    self._subjects[value.subject][number] = msgspec.structs.replace(version, is_deleted=True)

    def _apply_schema(self, key: SchemaKey, value: SchemaValue | None) -> None:
        subject, number = key.subject, key.version
        context = context_of(subject)
        before = self._subjects.get(subject, {}).pop(number, None)
        if before is not None:
            self._drop(subject, number, context, before)
        if value is None:
            if not self._subjects.get(subject):
                self._subjects.pop(subject, None)
            return
        schema = Schema(
            value.schema,
            SchemaType(value.schemaType or SchemaType.AVRO),
            tuple(value.references or ()),
            value.metadata,
            value.ruleSet,
        )
        schema = self._schemas.setdefault(context, {}).setdefault(value.id, schema)
        self._subjects.setdefault(subject, {})[number] = Version(number, value.id, schema, value.deleted)
        self._ids.setdefault(context, {}).setdefault(schema.digest(), value.id)
        self._users.setdefault((context, value.id), set()).add((subject, number))
        self._next_ids[context] = max(self._next_ids.get(context, 1), value.id + 1)
        for reference in schema.references:
            self._referrers.setdefault((reference.subject, reference.version), set()).add((subject, number))

    def _drop(self, subject: str, number: int, context: str, version: Version) -> None:
        users = self._users.get((context, version.id), set())
        users.discard((subject, number))
        if not users:
            self._users.pop((context, version.id), None)
            self._schemas.get(context, {}).pop(version.id, None)
            digest = version.schema.digest()
            if self._ids.get(context, {}).get(digest) == version.id:
                del self._ids[context][digest]
        for reference in version.schema.references:
            self._referrers.get((reference.subject, reference.version), set()).discard((subject, number))


def _parse(kind: SchemaType, text: str, references: Mapping[str, str]) -> Parsed:
    """Each format's libraries are loaded when it is first met: they are large. Raises InvalidSchema."""
    if kind is SchemaType.AVRO:
        from headwater.schema.avro import AvroSchema

        return AvroSchema(text, references)
    if kind is SchemaType.JSON:
        from headwater.schema.json_schema import JsonSchema

        return JsonSchema(text, references)
    from headwater.schema.protobuf import ProtobufSchema

    return ProtobufSchema(text, references)


def context_of(subject: str) -> str:
    """`:.name:subject` is in the context `.name`."""
    if subject.startswith(":."):
        name, colon, _ = subject[1:].partition(":")
        if colon:
            return name
    return DEFAULT_CONTEXT


def _scope_of(context: str) -> str:
    """Under which the config and the mode of a context are kept."""
    return f":{context}:"


def _scopes(subject: str | None) -> list[str | None]:
    """Where its config and mode are looked for, the nearest first."""
    if subject is None:
        return [None]
    context = context_of(subject)
    return [subject, None] if context == DEFAULT_CONTEXT else [subject, _scope_of(context), None]


def _has_prefix(subject: str, prefix: str) -> bool:
    """`:*:` is every context; else names are those of the default one unless the prefix says otherwise."""
    if prefix.startswith(":*:"):
        bare = subject.partition(":")[2].partition(":")[2] if context_of(subject) != DEFAULT_CONTEXT else subject
        return bare.startswith(prefix[3:])
    if prefix.startswith(":."):
        return subject.startswith(prefix)
    return context_of(subject) == DEFAULT_CONTEXT and subject.startswith(prefix)


def _same(known: Schema, wanted: Schema) -> bool:
    """Without metadata and rules of its own, a schema stands for any with its text."""
    if known.text != wanted.text or known.type is not wanted.type or known.references != wanted.references:
        return False
    return (wanted.metadata is None or known.metadata == wanted.metadata) and (
        wanted.rule_set is None or known.rule_set == wanted.rule_set
    )


def _with_defaults(schema: Schema, config: ConfigValue) -> Schema:
    """Metadata and rules: the subject's defaults, then the schema's own, then what the subject insists on."""
    metadata = _merged(config.defaultMetadata, schema.metadata, config.overrideMetadata)
    rule_set = _merged(config.defaultRuleSet, schema.rule_set, config.overrideRuleSet)
    return msgspec.structs.replace(schema, metadata=metadata, rule_set=rule_set)


def _merged(*parts: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Objects inside are merged by name, lists of rules by the rules' names."""
    found: dict[str, Any] | None = None
    for part in parts:
        for name, value in (part or {}).items():
            found = found if found is not None else {}
            before = found.get(name)
            if isinstance(before, dict) and isinstance(value, dict):
                found[name] = {**before, **value}
            elif isinstance(before, list) and isinstance(value, list) and name.endswith("Rules"):
                found[name] = list({rule.get("name"): rule for rule in [*before, *value]}.values())
            else:
                found[name] = value
    return found


def _property(schema: Schema, name: str) -> object:
    return ((schema.metadata or {}).get("properties") or {}).get(name)


def _schema_record(subject: str, version: Version) -> Record:
    schema = version.schema
    value = SchemaValue(
        subject=subject,
        version=version.version,
        id=version.id,
        schema=schema.text,
        deleted=version.is_deleted,
        schemaType=None if schema.type is SchemaType.AVRO else str(schema.type),
        references=list(schema.references) or None,
        metadata=schema.metadata,
        ruleSet=schema.rule_set,
    )
    return Record(SchemaKey(subject=subject, version=version.version), value)


def _set(config: ConfigValue | None) -> dict[str, Any]:
    if config is None:
        return {}
    return {name: value for name, value in msgspec.structs.asdict(config).items() if value is not None}


def _put(known: dict[str | None, Any], subject: str | None, value: object) -> None:
    if value is None:
        known.pop(subject, None)
    else:
        known[subject] = value


def _shown(references: Sequence[Reference]) -> str:
    return "[" + ", ".join(f"{{name='{r.name}', subject='{r.subject}', version={r.version}}}" for r in references) + "]"
