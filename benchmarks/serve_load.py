#!/usr/bin/env python
"""Load a server to saturation and watch its memory.

    python -m benchmarks.serve_load                  # ten minutes, 24 clients: results/serve_load.json
    python -m benchmarks.serve_load --minutes 1 --out load.json

More clients than the queue has places ask for classifications and attacks without a pause: new labels every time, so
that caches have to evict entries, images of many sizes and formats, and damaged ones. Exits with 1 when the memory of
the last quarter is more than a twentieth above that of the second, or when anything but 200, 400 or 503 was answered.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from tests.helpers.serving import files, resident_mb, served
from zepad_mm.utils.io import write_json
from zepad_mm.utils.provenance import provenance

ROOT = Path(__file__).parents[1]
ALLOWED = {"200", "400", "503"}
GROWTH = 1.05
EVERY_S = 2.0


class Client(threading.Thread):
    """Sends requests until ``stop`` is set."""

    def __init__(self, url: str, images: list[bytes], seed: int, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.url, self.images, self.draw, self.stop = url, images, random.Random(seed), stop
        self.answered: Counter[str] = Counter()
        self.seconds: dict[str, list[float]] = {"classify": [], "attack": []}

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=600) as client:
            while not self.stop.is_set():
                kind = self.draw.choice(["classify", "classify", "attack"])
                labels = [f"a {self.draw.randrange(10**9)} thing" for _ in range(self.draw.randint(2, 12))]
                image = self.draw.choice(self.images)
                if self.draw.random() < 0.05:
                    image = image[: self.draw.randrange(len(image))]
                form: dict[str, Any] = {"labels": labels, "template": self.draw.choice(["single", "photo"])}
                if kind == "attack":
                    form |= {"attack": self.draw.choice(["universal", "public", "white_box"]), "epsilon": "4"}
                began = time.perf_counter()
                try:
                    status = str(client.post(f"/v1/{kind}", data=form, files={"image": image}).status_code)
                except httpx.HTTPError as error:
                    status = type(error).__name__
                self.answered[status] += 1
                if status == "200":
                    self.seconds[kind].append(time.perf_counter() - began)
                if status == "503":
                    time.sleep(0.2)  # a client that retries at once would measure rejections


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "serve_load.json")
    args = parser.parse_args()
    memory: list[tuple[float, float]] = []
    with served() as (url, process):
        stop = threading.Event()
        images = files()
        clients = [Client(url, images, seed, stop) for seed in range(args.clients)]
        began = time.perf_counter()
        for client in clients:
            client.start()
        while (now := time.perf_counter() - began) < 60 * args.minutes and process.poll() is None:
            memory.append((round(now, 1), round(resident_mb(process), 1)))
            time.sleep(EVERY_S)
        alive = process.poll() is None
        stop.set()
        for client in clients:
            client.join(620)
    answered = sum((client.answered for client in clients), Counter())
    quarters = [memory[len(memory) * q // 4 : len(memory) * (q + 1) // 4] for q in range(4)]
    means = [statistics.fmean(mb for _, mb in quarter) for quarter in quarters]
    flat = means[3] <= GROWTH * means[1]
    record: dict[str, Any] = {
        "meta": provenance(seed=0, config={"minutes": args.minutes, "clients": args.clients, "model": "embedded"}),
        "answered": dict(sorted(answered.items())),
        "seconds": {kind: _quantiles([s for c in clients for s in c.seconds[kind]]) for kind in ("classify", "attack")},
        "memory_mb": {"by_quarter": [round(mean, 1) for mean in means], "highest": max(mb for _, mb in memory)},
        "memory_samples": memory[:: max(1, len(memory) // 60)],
        "flat": flat,
        "alive": alive,
    }
    write_json(args.out, record)
    print(f"{args.out}: {record['answered']}, memory by quarter {record['memory_mb']['by_quarter']} MB")
    return 0 if flat and alive and set(answered) <= ALLOWED else 1


def _quantiles(seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {"n": len(seconds)}
    cuts = statistics.quantiles(seconds, n=100)
    return {
        "n": len(seconds),
        "median": round(cuts[49], 3),
        "p95": round(cuts[94], 3),
        "highest": round(max(seconds), 3),
    }


if __name__ == "__main__":
    sys.exit(main())
