"""The event loop of every process that is ours alone."""

import asyncio


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's, where it exists."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
