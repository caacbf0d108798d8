"""How long a user waits for the first thing to happen: import, help, and a caption painted from a cold start.

Run as `python -m kartina.benchmarks.start`, or by path with the package installed. Every run is a new process, and the
figure is the median; `import torch` alone is timed in the same loop, as what no program here can be faster than.
`--json` prints one JSON line. It does not empty the disk cache.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

CAPTION = "a small red ring above a large green square on a white background"


def commands(model: str, out: str) -> dict[str, list[str]]:
    """What is timed, by name, as the arguments of Python; kartina is run as an installed package."""
    main = "from kartina.cli import main; main()"
    paint = ["-c", main, "paint", CAPTION, "--model", model, "--out", f"{out}/x.png"]
    return {
        "import torch": ["-c", "import torch"],
        "import kartina": ["-c", "import kartina"],
        "kartina --help": ["-c", main, "--help"],
        "paint, one candidate": paint,
        "paint, the best of 8": [*paint, "--candidates", "8"],
    }


def measure(model: str, repeats: int) -> dict[str, float]:
    """Median seconds by name; the commands take turns, so a busy moment meets all of them alike."""
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as out:
        for _ in range(repeats):
            for name, words in commands(model, out).items():
                begin = time.perf_counter()
                subprocess.run([sys.executable, *words], check=True, capture_output=True)
                seconds.setdefault(name, []).append(time.perf_counter() - begin)
    return {name: round(statistics.median(each), 3) for name, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each; the median counts")
    parser.add_argument("--model", default="shapes/dalle", help="a shipped model's name or a model folder")
    options = parser.parse_args()
    result = measure(options.model, options.repeats)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:22s} {value:7.2f} s   {value / result['import torch']:5.2f} x import torch")


if __name__ == "__main__":
    main()
