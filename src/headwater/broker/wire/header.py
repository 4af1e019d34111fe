"""Request and response headers (Kafka's RequestHeader 0-2, ResponseHeader 0-1).

    request  = api_key i16, api_version i16, correlation_id i32, client_id nullable string [, tagged fields]
    response = correlation_id i32 [, tagged fields]

The client id stays a plain nullable string in flexible headers too. The response header of ApiVersions is always
version 0: a client that asks does not know yet what the broker speaks (KIP-511).
"""

import struct
from typing import NamedTuple

from headwater.broker.wire.errors import MalformedMessage
from headwater.broker.wire.varint import Buffer, skip_tags

FIXED = struct.Struct(">hhih")  # key, version, correlation id, length of the client id
CORRELATION_ID = struct.Struct(">i")


class RequestHeader(NamedTuple):
    api_key: int
    api_version: int
    correlation_id: int
    client_id: str
    body: int
    """Position of the request's body; behind the tagged fields once `skip_header_tags` has been asked."""


def decode_request_header(frame: Buffer) -> RequestHeader:
    """The header of a request. Its tagged fields are not skipped: only the API knows whether it has any."""
    try:
        api_key, api_version, correlation_id, size = FIXED.unpack_from(frame)
    except struct.error:
        raise MalformedMessage("the frame is shorter than a request header") from None
    body = FIXED.size + max(size, 0)
    if size < -1 or body > len(frame):
        raise MalformedMessage("the client id is longer than the frame")
    try:
        client_id = str(frame[FIXED.size : body], "utf-8")
    except UnicodeDecodeError:
        raise MalformedMessage("the client id is not UTF-8") from None
    return RequestHeader(api_key, api_version, correlation_id, client_id, body)


def skip_header_tags(frame: Buffer, header: RequestHeader) -> RequestHeader:
    return header._replace(body=skip_tags(frame, header.body))
