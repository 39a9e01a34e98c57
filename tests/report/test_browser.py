"""The page in a real browser: headless Chromium runs a script in it that clicks the filters; skipped where there is none."""

import html
import json
import shutil
import subprocess

import pytest
from test_page import METRICS, SUMMARY, picture

from finecap_ray.report.page import ReportBag, ReportImage, ReportRun, System, write_report
from finecap_ray.report.settings_diff import SettingsDiff

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: apt-get install chromium")

SYSTEMS = [System("0/mle", "a, before"), System("0/rl", "a, after"), System("1/rl", "b, after")]
# Ranks by a before, a after and b after, of the images of each bag.
RANKS = {"won": ["211", "111"], "regressed": ["121", "221"], "lost of three": ["222", "222", "111"]}

CLICKS = """
const said = { errors: window.failures, steps: [] };
const look = () => [...document.querySelectorAll(".bag")].filter((own) => !own.hidden).map((own) => own.dataset.bag);
const set = (id, value, kind) => {
  const field = document.getElementById(id);
  field.value = value;
  field.dispatchEvent(new Event(kind));
};
const step = (name) => said.steps.push([name, look(), document.getElementById("shown").textContent]);
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
window.addEventListener("load", async () => {
  step("opened");
  for (const outcome of ["won", "regressed", "lost", ""]) {
    document.querySelector(`button[data-outcome="${outcome}"]`).click();
    step(outcome || "all");
  }
  set("size", "3", "change"); step("size 3");
  set("size", "", "change");
  set("search", "RED HAT", "input"); await wait(300); step("search");
  set("search", "no such words", "input"); await wait(300); step("nothing");
  said.none = !document.getElementById("none").hidden;
  set("search", "", "input"); await wait(300);
  set("to", "2", "change");
  document.querySelector('button[data-outcome="won"]').click(); step("b: won");
  said.width = window.innerWidth;
  said.fits = document.documentElement.scrollWidth <= window.innerWidth;
  said.pressed = document.querySelectorAll('button[aria-pressed="true"]').length;
  const result = top.document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(said);
  top.document.body.append(result);
});
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of two runs, with the clicks in it."""
    bags = []
    for name, ranks in RANKS.items():
        images = []
        for row, own in enumerate(ranks):
            by = {system.key: float(rank) for system, rank in zip(SYSTEMS, own, strict=True)}
            other = f"{name}-{(row + 1) % len(ranks)}"
            images.append(
                ReportImage(
                    image_id=f"{name}-{row}",
                    image=picture("red"),
                    captions={key: "a man in a red hat" if (name, key) == ("won", "0/rl") else "a man" for key in by},
                    rank=by,
                    competitor={key: None if rank == 1 else other for key, rank in by.items()},
                )
            )
        bags.append(ReportBag(name, 0.5, "seen", tuple(images)))
    runs = [ReportRun(name, SUMMARY, "seed: 0\n", SettingsDiff("the defaults", ()), METRICS) for name in ("a", "b")]
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, title="a and b", runs=runs, systems=SYSTEMS, before="0/mle", after="0/rl", bags=bags)
    watch = (
        "<head><script>window.failures = []; addEventListener('error', (own) => failures.push(own.message));</script>"
    )
    text = (
        path.read_text(encoding="utf-8")
        .replace("<head>", watch)
        .replace("</body>", f"<script>{CLICKS}</script></body>")
    )
    path.write_text(text, encoding="utf-8")
    return path


def opened(page, width: int, profile) -> tuple[dict, str]:
    """What the clicks saw, and what the browser wrote on its console.

    The window of headless Chromium is never narrower than 500 pixels; a frame in it is.
    """
    framed = profile / "framed.html"
    inside = html.escape(page.read_text(encoding="utf-8"))
    frame = (
        f'<!DOCTYPE html><meta charset="utf-8"><iframe srcdoc="{inside}" width="{width}" height="900" frameborder="0">'
    )
    framed.write_text(f"{frame}</iframe>", encoding="utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--virtual-time-budget=8000",
        "--run-all-compositor-stages-before-draw",
    ]
    done = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={profile}", "--window-size=1400,1000", "--dump-dom", framed.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    result = done.stdout.partition('<pre id="result">')[2].partition("</pre>")[0]
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(result.replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&")), console


@pytest.mark.parametrize("width", [1280, 360], ids=["desktop", "phone"])
def test_the_filters_show_what_they_say(page, width, tmp_path):
    said, console = opened(page, width, tmp_path)
    every = list(RANKS)
    steps = [(name, bags) for name, bags, _ in said["steps"]]
    assert steps == [
        ("opened", every),
        ("won", ["won"]),
        ("regressed", ["regressed"]),
        ("lost", ["regressed", "lost of three"]),  # an image of the second is found by neither
        ("all", every),
        ("size 3", ["lost of three"]),
        ("search", ["won"]),
        ("nothing", []),
        ("b: won", ["won", "regressed"]),  # from a before to b after
    ]
    assert said["steps"][1][2] == "1 of 3 bags"
    assert said["width"] == width and said["fits"]  # no sideways scrolling
    assert said["none"] and said["pressed"] == 1
    assert said["errors"] == [] and console == ""
