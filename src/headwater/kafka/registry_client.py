"""A client of any registry with Confluent's API, over the standard library's HTTP: what an application and the command line
need of one. A name and a password are those of the URL, `https://user:password@host`."""

import base64
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

import msgspec

if TYPE_CHECKING:
    from urllib.error import HTTPError

SECONDS = 15.0
MAX_ANSWER = 64 * 1024 * 1024
MEDIA_TYPE = "application/vnd.schemaregistry.v1+json"


class RegistryUnreachable(Exception):
    """There is no answer; the message says what to do."""


class Refused(Exception):
    """The registry's own answer."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class RegistryClient:
    def __init__(self, url: str) -> None:
        parts = urlsplit(url.rstrip("/"))
        self._url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self._headers = {"Content-Type": MEDIA_TYPE}
        if parts.username is not None:
            said = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["Authorization"] = "Basic " + base64.b64encode(said.encode()).decode()

    def subjects(self) -> list[str]:
        return list(self.ask("GET", "/subjects"))

    def versions(self, subject: str) -> list[int]:
        return list(self.ask("GET", f"/subjects/{_quoted(subject)}/versions"))

    def version(self, subject: str, version: str, *, deleted: bool = False) -> dict[str, Any]:
        """deleted: also one that was soft-deleted."""
        wanted = "?deleted=true" if deleted else ""
        return dict(self.ask("GET", f"/subjects/{_quoted(subject)}/versions/{_quoted(version)}{wanted}"))

    def level(self, subject: str) -> str:
        return str(self.ask("GET", f"/config/{_quoted(subject)}?defaultToGlobal=true")["compatibilityLevel"])

    def register(self, subject: str, schema: str, kind: str) -> int:
        return int(self.ask("POST", f"/subjects/{_quoted(subject)}/versions", _body(schema, kind))["id"])

    def look_up(self, subject: str, schema: str, kind: str) -> int:
        """The id of what is registered there already."""
        return int(self.ask("POST", f"/subjects/{_quoted(subject)}", _body(schema, kind))["id"])

    def schema(self, id: int) -> dict[str, Any]:
        return dict(self.ask("GET", f"/schemas/ids/{id}"))

    def check(self, subject: str, schema: str, kind: str) -> list[str]:
        """What stands against it, by the subject's level."""
        path = f"/compatibility/subjects/{_quoted(subject)}/versions?verbose=true"
        answer = self.ask("POST", path, _body(schema, kind))
        return [] if answer["is_compatible"] else list(answer.get("messages") or ["it is incompatible"])

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """Raises RegistryUnreachable, Refused."""
        from http.client import HTTPException
        from urllib.error import HTTPError  # slow to import: for those that ask a registry
        from urllib.request import Request, urlopen

        data = msgspec.json.encode(body) if body is not None else None
        try:
            with urlopen(Request(self._url + path, data, self._headers, method=method), timeout=SECONDS) as answer:
                return msgspec.json.decode(answer.read(MAX_ANSWER))
        except HTTPError as error:
            raise _refused(error) from None
        except (OSError, ValueError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise RegistryUnreachable(
                f"no schema registry answers at {self._url}: {reason}. Start one with `headwater registry`, or name another "
                "with --registry."
            ) from None


def _refused(error: "HTTPError") -> Refused:
    try:
        answer = msgspec.json.decode(error.read())
        return Refused(error.code, int(answer["error_code"]), str(answer["message"]))
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        return Refused(error.code, error.code, f"HTTP {error.code}: it is no schema registry's answer")


def _quoted(part: str) -> str:
    return quote(part, safe="")


def _body(schema: str, kind: str) -> dict[str, str]:
    return {"schema": schema, "schemaType": kind}
