"""Fixtures by which jupyter_server's own tests talk to a server that runs already.

tests/upstream.py appends them to the suite's conftest.py: they take the place of those of
pytest-jupyter, which start a server for each test.
"""

import asyncio
import json
import os
import shutil
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.websocket import websocket_connect

URL = os.environ["UPSTREAM_URL"]
HEADERS = json.loads(os.environ["UPSTREAM_HEADERS"])
SERVED = Path(os.environ["UPSTREAM_ROOT"])


class RunningServer:
    """Stands for the application, which is in another process: tests that look skip."""

    root_dir = str(SERVED)
    base_url = urllib.parse.urlsplit(URL).path

    def __getattr__(self, name):
        pytest.skip(f"looks at the application itself: {name}")


def request(parts: Any, headers: Any, params: Any, **options: Any) -> HTTPRequest:
    url = URL + urllib.parse.quote("/".join(each.strip("/") for each in parts))
    query = urllib.parse.urlencode(params or {})
    headers = {**HEADERS, **(headers or {})}
    url = f"{url}?{query}" if query else url
    return HTTPRequest(url, headers=headers, validate_cert=False, **options)


@pytest.fixture
def jp_serverapp():
    return RunningServer()


@pytest.fixture
def jp_base_url():
    return RunningServer.base_url


@pytest.fixture
def jp_root_dir():
    for path in SERVED.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return SERVED


@pytest.fixture
def jp_asyncio_loop():
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield loop
    loop.close()


@pytest.fixture
def jp_fetch(jp_root_dir):
    async def fetch(*parts, headers=None, params=None, **options):
        return await AsyncHTTPClient().fetch(request(parts, headers, params, **options))

    return fetch


@pytest.fixture
def jp_ws_fetch(jp_root_dir):
    async def connect(*parts, headers=None, params=None, **options):
        wanted = request(parts, headers, params)
        wanted.url = wanted.url.replace("http", "ws", 1)
        return await websocket_connect(wanted)

    return connect
