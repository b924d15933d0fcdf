"""HTTP clients of the verifier, judge and critic models: OpenAI-compatible servers."""

import collections
import concurrent.futures
import contextlib
import http.client
import json
import os
import sqlite3
import time
import urllib.error
import urllib.request

from common.errors import UserError
from common.files import RUNS
from common.keys import hash_of

HTTP_SECONDS = 120  # how long a server may be silent
BACKOFF_SECONDS = 0.5  # the wait before a failed call is made again; doubled each time
CALLS_AT_ONCE = 16  # so that a server can batch them
GIVE_UP_AFTER = 32  # failed calls to a server that never answered
HOPELESS = (400, 401, 403, 404)  # HTTP errors that the same call would meet again
REPLIES = RUNS / "replies.sqlite"  # all runs share it


def http_json(url: str, body: dict | None = None) -> dict:
    """The JSON reply to a GET, or to a POST of `body`.

    Raises OSError (urllib's errors are of that kind), http.client.HTTPException, or ValueError for
    a reply that is not JSON.
    """
    headers = {"Content-Type": "application/json"}
    # The key is no flag, because flags are written to args.json. Sandbox servers do not get it.
    key = os.environ.get("OPENAI_API_KEY")
    if key and "/v1/" in url:
        headers["Authorization"] = f"Bearer {key}"
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(request, timeout=HTTP_SECONDS) as reply:
        return json.load(reply)


def call_with_retries(call, server: str, retries: int):
    """What call() returns or, after `retries` + 1 failures, a UserError that names the last one.

    The waits between calls are 1, 2, 4 … times BACKOFF_SECONDS.
    """
    for attempt in range(retries + 1):
        try:
            return call()
        except (
            OSError,
            http.client.HTTPException,
            ValueError,
            KeyError,
            IndexError,
            TypeError,
        ) as error:
            failure = UserError(f"{server}: {type(error).__name__} {error}")
            if isinstance(error, urllib.error.HTTPError) and error.code in HOPELESS:
                break
            if attempt < retries:
                time.sleep(BACKOFF_SECONDS * 2**attempt)
    return failure


def ask_all(base: str, prompts: list[str], who: str, retries: int = 3) -> list[str | UserError]:
    """A greedy completion per prompt, or a UserError if all `retries` + 1 calls for it failed.

    base: the server's address. who: verifier, judge or critic, for messages.
    Replies are cached in REPLIES by the exact request (address, model, prompt): what was asked
    once, by this run or another, is not asked again. Failures are not cached. A server that answers
    none of GIVE_UP_AFTER calls is not asked the rest.
    """
    base = base.rstrip("/").removesuffix("/v1")
    server = f"{who} at {base}"
    model = call_with_retries(
        lambda: http_json(f"{base}/v1/models")["data"][0]["id"], server, retries
    )
    if isinstance(model, UserError):
        return [model] * len(prompts)

    bodies = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        bodies.append({"model": model, "temperature": 0, "messages": messages})
    keys = [hash_of([base, body]) for body in bodies]

    REPLIES.parent.mkdir(exist_ok=True)
    # isolation_level=None: each reply is written as it comes, and no transaction locks the file.
    connection = sqlite3.connect(REPLIES, timeout=60, isolation_level=None)
    with contextlib.closing(connection) as cache:
        replies = cached_replies(cache, keys)
        new_bodies = {key: body for key, body in zip(keys, bodies) if key not in replies}
        new_replies = ask_new(base, list(new_bodies.values()), server, retries)
        for key, reply in zip(new_bodies, new_replies):
            replies[key] = reply
            if isinstance(reply, str):
                with contextlib.suppress(sqlite3.OperationalError):  # busy or full: ask again later
                    cache.execute("insert or replace into replies values (?, ?)", (key, reply))
    return [replies[key] for key in keys]


def cached_replies(cache: sqlite3.Connection, keys: list[str]) -> dict[str, str]:
    """{key: reply} of the keys that are in the cache."""
    cache.execute("create table if not exists replies (key text primary key, reply text)")
    replies = {}
    for key in keys:
        record = cache.execute("select reply from replies where key = ?", (key,)).fetchone()
        if record:
            replies[key] = record[0]
    return replies


def ask_new(base: str, bodies: list[dict], server: str, retries: int):
    """Yield the reply, or the UserError, of each request: in order, and as soon as it is there."""
    counts = collections.Counter()  # requests "answered" and "failed", of all threads

    def ask(body):
        if counts["failed"] >= GIVE_UP_AFTER and not counts["answered"]:
            return UserError(
                f"{server}: not asked, because it answered none of {counts['failed']} calls"
            )
        reply = call_with_retries(lambda: completion(base, body), server, retries)
        counts["failed" if isinstance(reply, UserError) else "answered"] += 1
        return reply

    with concurrent.futures.ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
        yield from pool.map(ask, bodies)


def completion(base: str, body: dict) -> str:
    """The text of one reply. Raises what http_json raises, and KeyError and the like."""
    reply = http_json(f"{base}/v1/chat/completions", body)
    return str(reply["choices"][0]["message"]["content"] or "")
