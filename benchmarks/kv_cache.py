"""How much the key/value cache saves: seconds for 64 codes at batch 16, computed anew and cached.

Run as `python -m kartina.benchmarks.kv_cache`, or by path with the package installed. `--json` prints one JSON line.
It checks that both ways draw the same codes. It does not know trained weights: they do not change the time.
"""

import argparse
import json
import time

import torch

from kartina.priors.code_samplers import sample_codes
from kartina.priors.dalle import DALLE


def seconds(prior: DALLE, text: torch.Tensor, use_cache: bool, repeats: int) -> tuple[float, torch.Tensor]:
    """The best of `repeats` runs, after one short warm-up, and the codes."""
    prior.prefill(text)
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        codes = sample_codes(prior, text, list(range(len(text))), use_cache=use_cache)
        best = min(best, time.perf_counter() - begin)
    return best, codes


def measure(batch: int = 16, width: int = 256, depth: int = 6, repeats: int = 2) -> dict[str, float | int]:
    """Both timings and their ratio, on the CPU, for an 8x8 grid and captions of 32 tokens."""
    torch.manual_seed(0)
    prior = DALLE(4096, 32, 512, (8, 8), width, depth, width // 64, attention="full").eval()
    text = torch.randint(0, 4096, (batch, 32))
    with torch.no_grad():
        cached, codes = seconds(prior, text, True, repeats)
        uncached, again = seconds(prior, text, False, repeats)
    if not torch.equal(codes, again):
        raise SystemExit(f"the cache draws other codes: only {(codes == again).float().mean():.4f} of them are equal")
    return {
        "batch": batch,
        "codes": 64,
        "width": width,
        "depth": depth,
        "threads": torch.get_num_threads(),
        "uncached_seconds": round(uncached, 3),
        "cached_seconds": round(cached, 3),
        "ratio": round(uncached / cached, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each way; the best one counts")
    options = parser.parse_args()
    result = measure(repeats=options.repeats)
    if options.json:
        print(json.dumps(result))
    else:
        print("{ratio} times faster: {uncached_seconds} s anew, {cached_seconds} s cached".format(**result))


if __name__ == "__main__":
    main()
