#!/usr/bin/env python
"""Send fuzzed requests to a server; none may crash it.

    python -m benchmarks.serve_fuzz                          # 10,000 requests: results/serve_fuzz.json
    python -m benchmarks.serve_fuzz --n 200 --examples 5 --out fuzz.json

Two kinds. Damaged ones of our own: flipped, cut and spliced images of every format, absurd fields, broken forms,
wrong methods and paths. And what schemathesis makes of the OpenAPI description. Exits with 1 on any 5xx but 503, on a
connection that is dropped, or when the server is dead at the end.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from tests.helpers.serving import files, served
from zepad_mm.utils.io import write_json
from zepad_mm.utils.provenance import provenance

ROOT = Path(__file__).parents[1]
TEXTS = ["", " ", "cat", "dog", "\x00", "\udfff".encode("utf-8", "surrogatepass").decode("utf-8", "replace"), "🐈" * 30]
TEXTS += ("{}", "{0}", "{} {}", "{x}", "a photo of a {}.", "photo", "../../etc/passwd", "%s%n", "'; --", "x" * 101)
NUMBERS = ("", "0", "1", "-1", "8", "16", "17", "1e3", "nan", "inf", "9" * 400, "0x10", "true", "None", "4/255")


def damaged(draw: random.Random, images: list[bytes]) -> bytes:
    """A damaged image file, or random bytes."""
    kind = draw.randrange(6)
    data = bytearray(draw.choice(images))
    if kind == 0:
        return bytes(data)
    if kind == 1:
        return bytes(data[: draw.randrange(len(data))])
    if kind == 2:
        for _ in range(draw.randint(1, 40)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        return bytes(data)
    if kind == 3:
        other = draw.choice(images)
        return bytes(data[: draw.randrange(len(data))] + other[draw.randrange(len(other)) :])
    if kind == 4:  # the header, which holds sizes and modes
        for _ in range(draw.randint(1, 6)):
            data[draw.randrange(min(64, len(data)))] = draw.randrange(256)
        return bytes(data)
    return draw.randbytes(draw.choice([0, 1, 7, 5000]))


def send(client: httpx.Client, draw: random.Random, images: list[bytes]) -> httpx.Response:
    """Send one fuzzed request."""
    path = draw.choice(["/v1/classify", "/v1/classify", "/v1/attack", "/v1/attack", "/v1/nothing"])
    kind = draw.randrange(10)
    if kind == 0:
        method = draw.choice(["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE"])
        return client.request(method, draw.choice([path, "/v1/model", "/openapi.json", "/v1/health"]))
    if kind == 1:  # no form at all, or a broken one
        types = ["application/json", "text/plain", "multipart/form-data", "multipart/form-data; boundary=x", "", "é"]
        body = draw.choice(
            [b"", b"{", b"--x", b"--x\r\n\r\n--x--", b"--x\r\nContent-Disposition: form-data\r\n\r\n\xff"]
        )
        body += draw.randbytes(draw.choice([0, 50, 2000]))
        return client.post(path, content=body, headers={b"content-type": draw.choice(types).encode()})
    texts = draw.choices(TEXTS, k=draw.randint(0, 5))
    form: dict[str, Any] = {"labels": texts if draw.random() < 0.3 else ["cat", "dog", *texts[:1]]}
    if draw.random() < 0.02:
        form["labels"] = [str(number) for number in range(draw.choice([50, 51, 3000]))]
    for name, values in (
        ("template", TEXTS), ("label", TEXTS), ("top_k", NUMBERS), ("epsilon", NUMBERS), ("evidence", NUMBERS),
        ("on_adversarial", (*TEXTS, "flag", "abstain")), ("attack", (*TEXTS, "public", "white_box")), ("image", TEXTS),
    ):  # fmt: skip
        if draw.random() < 0.07:
            form[name] = draw.choice(values)
    name = draw.choice(TEXTS) or "image"
    return client.post(path, data=form, files={"image": (name, damaged(draw, images))})


def schemathesis(url: str, examples: int, seed: int) -> dict[str, Any]:
    """Return what the command line of schemathesis finds with ``examples`` for each operation and phase."""
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--no-color"]
    command += ["--checks", "not_a_server_error,status_code_conformance,content_type_conformance"]
    command += ["--max-examples", str(examples), "--seed", str(seed), "--workers", "1", "--request-timeout", "120"]
    with TemporaryDirectory() as folder:  # schemathesis leaves a cache in its working directory
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    cases = re.search(r"(\d+) generated", done.stdout)
    summary = done.stdout[done.stdout.rfind("SUMMARY") :]
    if done.returncode:
        print(done.stdout[-6000:], file=sys.stderr)
    return {
        "code": done.returncode,
        "cases": int(cases.group(1)) if cases else None,
        "summary": summary.split("\n")[1:],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10_000, help="requests of our own")
    parser.add_argument("--examples", type=int, default=100, help="of schemathesis, for each operation and phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "serve_fuzz.json")
    args = parser.parse_args()
    draw, images = random.Random(args.seed), files()
    answered: Counter[str] = Counter()
    wrong: list[str] = []
    began = time.perf_counter()
    with served("--no-page") as (url, process), httpx.Client(base_url=url, timeout=120) as client:
        for number in range(args.n):
            try:
                response = send(client, draw, images)
            except httpx.TransportError as error:
                answered[type(error).__name__] += 1
                wrong.append(f"request {number}: {error!r}")
                continue
            answered[str(response.status_code)] += 1
            if response.status_code >= 500 and response.status_code != 503:
                asked = f"{response.request.method} {response.request.url.path}"
                wrong.append(f"request {number}: {asked} {response.status_code} {response.text[:200]}")
        found = schemathesis(url, args.examples, args.seed)
        alive = process.poll() is None and client.get("/v1/health").status_code == 200
    record = {
        "meta": provenance(seed=args.seed, config={"n": args.n, "examples": args.examples, "model": "embedded"}),
        "requests": args.n,
        "answered": dict(sorted(answered.items())),
        "server_errors": wrong[:20],
        "schemathesis": found,
        "alive": alive,
        "wall_s": round(time.perf_counter() - began, 1),
    }
    write_json(args.out, record)
    print(f"{args.out}: {record['answered']}; schemathesis {found['cases']} cases, exit code {found['code']}")
    return 0 if not wrong and alive and found["code"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
