"""A client of any registry with Confluent's API: what the command line needs, over the standard library's HTTP."""

import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import msgspec

SECONDS = 15.0
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
        self._url = url.rstrip("/")

    def subjects(self) -> list[str]:
        return list(self.ask("GET", "/subjects"))

    def versions(self, subject: str) -> list[int]:
        return list(self.ask("GET", f"/subjects/{_quoted(subject)}/versions"))

    def version(self, subject: str, version: str) -> dict[str, Any]:
        return dict(self.ask("GET", f"/subjects/{_quoted(subject)}/versions/{_quoted(version)}"))

    def level(self, subject: str) -> str:
        return str(self.ask("GET", f"/config/{_quoted(subject)}?defaultToGlobal=true")["compatibilityLevel"])

    def register(self, subject: str, schema: str, kind: str) -> int:
        return int(self.ask("POST", f"/subjects/{_quoted(subject)}/versions", _body(schema, kind))["id"])

    def check(self, subject: str, schema: str, kind: str) -> list[str]:
        """What stands against it, by the subject's level."""
        path = f"/compatibility/subjects/{_quoted(subject)}/versions?verbose=true"
        answer = self.ask("POST", path, _body(schema, kind))
        return [] if answer["is_compatible"] else list(answer.get("messages") or ["it is incompatible"])

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """Raises RegistryUnreachable, Refused."""
        data = msgspec.json.encode(body) if body is not None else None
        request = urllib.request.Request(self._url + path, data, method=method, headers={"Content-Type": MEDIA_TYPE})
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return msgspec.json.decode(answer.read())
        except urllib.error.HTTPError as error:
            raise _refused(error) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise RegistryUnreachable(
                f"no schema registry answers at {self._url}: {reason}. Start one with `headwater registry`, or name another "
                "with --registry."
            ) from None


def _refused(error: urllib.error.HTTPError) -> Refused:
    try:
        answer = msgspec.json.decode(error.read())
        return Refused(error.code, int(answer["error_code"]), str(answer["message"]))
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        return Refused(error.code, error.code, f"HTTP {error.code}: it is no schema registry's answer")


def _quoted(part: str) -> str:
    return urllib.parse.quote(part, safe="")


def _body(schema: str, kind: str) -> dict[str, str]:
    return {"schema": schema, "schemaType": kind}
