"""How soon the page of `explore.py` is there, and how soon a step after its key, in a real browser; and its memory.

    python benchmarks/explore.py --model demo/model --dataset demo/clips --decoder demo/decoder --output explore.json

Needs `make test-browser`'s set-up. A step's time goes from the key's event to the frame in which the browser paints the
decoded picture. Memory is the server's resident set, after every `--memory_every` of `--steps` that `--visitors` take.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import Page, sync_playwright

from vjepa_ac_hf.records import versions, write_json

ROOT = Path(__file__).resolve().parents[1]
KEYS = ("ArrowLeft", "w", "ArrowRight", "d", "ArrowUp", " ", "ArrowDown", "a")
ROUND = 40  # pictures of a story, which is then begun again


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--decoder")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--memory_every", type=int, default=200)
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--timed_steps", type=int, default=200, help="by one visitor alone, whose times are reported")
    parser.add_argument("--port", type=int, default=7990)
    args = parser.parse_args()
    if args.memory_every % args.visitors:
        parser.error(f"--memory_every must be a multiple of --visitors, found {args.memory_every} and {args.visitors}")
    return args


def open_page(browser: Any, address: str) -> Page:
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    page.goto(address)
    page.wait_for_function("window.vjepa && window.vjepa.ready", timeout=120_000)
    return page


def take_steps(page: Page, count: int) -> list[float]:
    """Milliseconds of `count` steps."""
    for number in range(count):
        if page.locator("#vx-strip .vx-cell").count() > ROUND:
            page.click("#vx-restart")
            page.wait_for_function("document.querySelectorAll('#vx-strip .vx-cell').length === 2")
        before = page.evaluate("vjepa.timings.length")
        page.keyboard.press(KEYS[number % len(KEYS)])
        page.wait_for_function(f"vjepa.timings.length > {before}", timeout=120_000)
    return page.evaluate(f"vjepa.timings.slice(-{count})")


def main() -> None:
    args = parse_arguments()
    flags = ["--model", args.model, "--dataset", args.dataset, "--port", str(args.port)]
    flags += ["--decoder", args.decoder] if args.decoder else []
    address = f"http://127.0.0.1:{args.port}/"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        started = time.perf_counter()
        program = [sys.executable, str(ROOT / "examples" / "explore.py"), *flags]
        server = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
        try:
            if not any(line.startswith("page: ") for line in server.stdout or ()):
                sys.exit("the program ended without a page")
            serving = time.perf_counter() - started
            page = open_page(browser, address)
            first_page = time.perf_counter() - started
            take_steps(page, 10)
            timed = sorted(take_steps(page, args.timed_steps))
            memory = psutil.Process(server.pid)
            pages = [page, *(open_page(browser, address) for _ in range(args.visitors - 1))]
            resident = {}
            for count in range(args.memory_every, args.steps + 1, args.memory_every):
                for one in pages:
                    take_steps(one, args.memory_every // args.visitors)
                resident[count] = memory.memory_info().rss / 2**20
        finally:
            server.terminate()
            server.wait()
        browser.close()
    result = {
        "cores": os.cpu_count(),
        "load_at_the_end": os.getloadavg(),
        "seconds_to_serving": serving,
        "seconds_to_first_page": first_page,
        "step_ms": {"median": statistics.median(timed), "p95": timed[int(0.95 * len(timed))], "steps": len(timed)},
        "resident_mb": resident,
        "steps": args.steps,
        "visitors": args.visitors,
        "versions": versions(),
    }
    write_json(args.output, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
