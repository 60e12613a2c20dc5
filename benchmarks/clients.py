"""Streaming clients for ``benchmarks/generation.py``: a process of their own, no packages.

    echo '{"port": 8000, "clients": 64, "requests": [{"prompt": …}]}' | python benchmarks/clients.py

A client sends the next request that no other has sent as soon as its last one is answered, so that
so many are under way until there are no more. Reports seconds.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any


async def client(
    port: int, requests: Iterator[dict[str, Any]]
) -> list[tuple[float, list[float], int]]:
    """Return time to first token, gaps between deliveries, and tokens, of each request."""
    found = []
    for body in requests:
        data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}})
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        began = last = time.perf_counter()
        writer.write(f"{head}content-length: {len(data)}\r\n\r\n{data}".encode())
        first, gaps, tokens = 0.0, [], 0
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue
            if b'"completion_tokens"' in line:
                tokens = json.loads(line[6:])["usage"]["completion_tokens"]
            elif b'"text"' in line:  # reading no more than this leaves the processor to the server
                now = time.perf_counter()
                if first:
                    gaps.append(now - last)
                else:
                    first = now - began
                last = now
        writer.close()
        found.append((first, gaps, tokens))
    return found


async def run(port: int, clients: int, requests: list[dict[str, Any]]) -> dict[str, float]:
    """Run all clients at once and sum up."""
    began = time.perf_counter()
    queue = iter(requests)
    found = await asyncio.gather(*(client(port, queue) for _ in range(clients)))
    seconds = time.perf_counter() - began
    flat = [entry for mine in found for entry in mine]
    firsts = sorted(first for first, _, _ in flat)
    gaps = sorted(gap for _, mine, _ in flat for gap in mine)
    tokens = sum(count for _, _, count in flat)
    return {
        "clients": clients,
        "requests": len(flat),
        "seconds": seconds,
        "new_tokens": tokens,
        "new_tokens_per_second": tokens / seconds,
        "first_token_p50": statistics.median(firsts),
        "first_token_p99": firsts[int(0.99 * (len(firsts) - 1))],
        "delivery_gap_p50": statistics.median(gaps),
        "delivery_gap_p99": gaps[int(0.99 * (len(gaps) - 1))],
        "deliveries": float(len(gaps) + len(firsts)),
    }


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    sys.stdout.write(json.dumps(asyncio.run(run(**asked))))
