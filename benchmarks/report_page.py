"""A report of 500 bags of 5: seconds to write, size, and milliseconds to open and to filter in headless Chromium.

    python benchmarks/report_page.py

The bags hold the embedded pictures with human captions; ranks are drawn at random. Writes benchmarks/results/report_page.json.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from finecap_ray.report.page import ReportBag, ReportImage, ReportRun, System, write_report
from finecap_ray.report.settings_diff import SettingsDiff
from finecap_ray.sources import read_examples

RESULTS = Path(__file__).parent / "results"
SIZE = 5
SYSTEMS = [System("mle", "before"), System("rl", "after"), System("human", "human")]
GROUP = {
    "bags": 500,
    "recall_at_1": {"mle": 0.4, "rl": 0.5, "human": 0.7},
    "interval": {"mle": [0.37, 0.43], "rl": [0.47, 0.53], "human": [0.67, 0.73], "gain": [0.07, 0.13]},
    "recall_at_1_by_reward_scorer": {"mle": 0.4, "rl": 0.6, "human": 0.7},
}
SUMMARY = {
    "bag_size": SIZE,
    "groups": {"whole": GROUP},
    "caption_metrics": {"mle": {}, "rl": {}},
    "captions_per_s": 0.0,
    "seconds": {},
}
MEASURE = """<script>
addEventListener("load", () => {
  const times = { opened_ms: performance.now() };
  const timed = (name, act) => {
    const start = performance.now();
    act();
    document.body.offsetHeight;  // lays the page out
    times[name] = performance.now() - start;
  };
  timed("filter_won_ms", () => document.querySelector('button[data-outcome="won"]').click());
  timed("filter_all_ms", () => document.querySelector('button[data-outcome=""]').click());
  timed("compare_ms", () => {
    const to = document.getElementById("to");
    to.value = "2";
    to.dispatchEvent(new Event("change"));
  });
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(times);
  document.body.append(result);
});
</script>"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bags", type=int, default=500)
    arguments = parser.parse_args()
    rng = random.Random(0)
    rows = read_examples("fluent").to_pylist()
    bags = [_bag(number, rng.sample(rows, SIZE), rng) for number in range(arguments.bags)]
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        started = time.perf_counter()
        run = ReportRun("benchmark", SUMMARY, "", SettingsDiff("the defaults", ()), [])
        write_report(page, title="500 bags", runs=[run], systems=SYSTEMS, before="mle", after="rl", bags=bags)
        result = {
            "bags": len(bags),
            "images": len(bags) * SIZE,
            "write_s": round(time.perf_counter() - started, 2),
            "megabytes": round(page.stat().st_size / 1e6, 2),
        }
        chromium = shutil.which("chromium")
        if chromium is None:
            print("no chromium on the PATH: the page isn't opened")
        else:
            result |= _opened(chromium, page, folder)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "report_page.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def _bag(number: int, rows: list[dict], rng: random.Random) -> ReportBag:
    images = []
    for row in rows:
        rank = {system.key: float(rng.choice([1, 1, 2, 3])) for system in SYSTEMS}
        other = rng.choice([own["image_id"] for own in rows if own is not row])
        images.append(
            ReportImage(
                image_id=row["image_id"],
                image=row["image"],
                captions={system.key: rng.choice(row["captions"]) for system in SYSTEMS},
                rank=rank,
                competitor={key: None if own == 1 else other for key, own in rank.items()},
            )
        )
    return ReportBag(f"bag-{number}", 0.5, rng.choice(["seen", "unseen"]), tuple(images))


def _opened(chromium: str, page: Path, profile: str) -> dict[str, float]:
    html = page.read_text(encoding="utf-8")
    page.write_text(html.replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={profile}/profile",
        "--window-size=1280,900",
    ]
    done = subprocess.run(
        [chromium, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=300, check=True
    )
    times = json.loads(done.stdout.partition('<pre id="result">')[2].partition("</pre>")[0])
    return {name: round(value, 1) for name, value in times.items()}


if __name__ == "__main__":
    main()
