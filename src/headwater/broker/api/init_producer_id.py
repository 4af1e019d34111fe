"""InitProducerId (API key 22), versions 0-5.

Behaviour
- Without a transactional id: a producer id that nobody had before, epoch 0 (KIP-98, KIP-360).
- With one: TRANSACTIONAL_ID_AUTHORIZATION_FAILED, which every client takes as final. There are no transactions yet, and
  a retriable error would make clients wait for ever.

Versions: 2 is flexible; 3 adds the producer's present id and epoch; 5 is for transactions (KIP-890).
Deviations: transactions.
Upstream: TransactionCoordinator#handleInitProducerId, ProducerIdManager.
"""

from typing import Annotated

from headwater.broker.api.request import Request
from headwater.broker.wire.errors import ErrorCode, ProtocolError
from headwater.broker.wire.message import Int16, Int32, Int64, Message, NullableString, since


class InitProducerIdRequest(Message):
    FLEXIBLE = 2
    transactional_id: NullableString
    transaction_timeout_ms: Int32
    producer_id: Annotated[Int64, since(3)] = -1
    producer_epoch: Annotated[Int16, since(3)] = -1


class InitProducerIdResponse(Message):
    FLEXIBLE = 2
    throttle_time_ms: Int32 = 0
    error_code: Int16 = 0
    producer_id: Int64 = -1
    producer_epoch: Int16 = -1


def handle(message: InitProducerIdRequest, request: Request) -> InitProducerIdResponse:
    if message.transactional_id == "":
        return InitProducerIdResponse(error_code=ErrorCode.INVALID_REQUEST)
    if message.transactional_id is not None:
        return InitProducerIdResponse(error_code=ErrorCode.TRANSACTIONAL_ID_AUTHORIZATION_FAILED)
    if (message.producer_id == -1) != (message.producer_epoch == -1):
        return InitProducerIdResponse(error_code=ErrorCode.INVALID_REQUEST)
    try:
        return InitProducerIdResponse(producer_id=request.node.new_producer_id(), producer_epoch=0)
    except ProtocolError as error:
        return InitProducerIdResponse(error_code=error.code)
