"""ApiVersions (API key 18), versions 0-4.

Behaviour
- Answers what `headwater.broker.dispatch` has, and nothing else.
- A version that isn't known is answered in version 0 with UNSUPPORTED_VERSION and the range of this API (KIP-511).
- A client software name or version that isn't a word is refused with INVALID_REQUEST (KIP-511).

Versions
- 3 is flexible, but the response header stays version 0; 4 may carry features with a minimum of 0.

Deviations: no features are advertised (KIP-584): neither transactions nor KIP-848 groups are there yet.
Upstream: org.apache.kafka.common.requests.ApiVersionsResponse.
"""

import re
from collections.abc import Iterable
from typing import Annotated

from headwater.broker.api.request import Request
from headwater.broker.wire.errors import ErrorCode
from headwater.broker.wire.message import Int16, Int32, Message, String, Structure, since

SOFTWARE_NAME = re.compile(r"[a-zA-Z0-9](?:[a-zA-Z0-9\-.]*[a-zA-Z0-9])?")


class ApiVersionsRequest(Message):
    FLEXIBLE = 3
    client_software_name: Annotated[String, since(3)] = ""
    client_software_version: Annotated[String, since(3)] = ""


class ApiVersion(Structure):
    api_key: Int16
    min_version: Int16
    max_version: Int16


class ApiVersionsResponse(Message):
    FLEXIBLE = 3
    error_code: Int16 = 0
    api_keys: list[ApiVersion] = []
    throttle_time_ms: Annotated[Int32, since(1)] = 0


_advertised: list[ApiVersion] = []


def advertise(ranges: Iterable[tuple[int, int, int]]) -> None:
    """The table's keys and versions, told by the table once."""
    _advertised[:] = [ApiVersion(*versions) for versions in ranges]


def handle(message: ApiVersionsRequest, request: Request) -> ApiVersionsResponse:
    if request.version >= 3 and not (
        SOFTWARE_NAME.fullmatch(message.client_software_name)
        and SOFTWARE_NAME.fullmatch(message.client_software_version)
    ):
        return ApiVersionsResponse(error_code=ErrorCode.INVALID_REQUEST)
    return ApiVersionsResponse(api_keys=_advertised)


def unsupported_version() -> bytearray:
    """The body for a client that is newer than we are: version 0, with what it may ask instead."""
    own = [version for version in _advertised if version.api_key == 18]
    return ApiVersionsResponse(error_code=ErrorCode.UNSUPPORTED_VERSION, api_keys=own).encode(0)
